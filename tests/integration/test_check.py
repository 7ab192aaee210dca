"""`realtime-bridge check`: what is broken is named, and what it says mends it."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import orjson
import pytest
from redis.asyncio import Redis

from realtime_bridge.checks import Finding, apply_fixes, failed, run_checks
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.processes import reserve_port
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.settings import Settings
from realtime_bridge.sources.postgres import PostgresSource, ensure_publication
from tests.bridges import PUBLICATION, environment, run
from tests.services import SECRET, PgBouncer, eventually, running

pytestmark = pytest.mark.integration

TABLE = "public.posts"


def settings_for(database: str | None, namespace: str = "test-check", **fields: Any) -> Settings:
    given = {
        "source": "postgres",
        "database_url": database,
        "supabase_jwt_secret": SECRET,
        "publication": PUBLICATION,
        "namespace": namespace,
        "slot": namespace.replace("-", "_"),
        **fields,
    }
    return Settings.load(env_file=None, **given)


async def look(database: str | None, namespace: str = "test-check", **fields: Any) -> dict[str, Finding]:
    findings = await run_checks(settings_for(database, namespace, **fields))
    by_name = {finding.name: finding for finding in findings}
    assert len(by_name) == len(findings), "every finding has a name of its own"
    return by_name


async def execute(database: str, statements: str) -> None:
    """Run statements, each in a transaction of its own."""
    connection = await asyncpg.connect(database)
    try:
        for statement in statements.split(";"):
            if statement.strip():
                await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def published(database: str) -> str:
    """The address of a database from which changes can be read."""
    await ensure_publication(database, PUBLICATION, [TABLE])
    return database


# -- Postgres ----------------------------------------------------------------------------------------------------------


async def test_a_healthy_set_up_has_no_problem(published: str, redis_url: str, namespace: str) -> None:
    found = await look(published, namespace, redis_url=redis_url)
    assert not failed(found.values())
    assert {f.status for f in found.values()} <= {"ok", "warning"}
    assert {name for name, f in found.items() if f.status == "warning"} == {"slot_limit", "redis_persistence"}
    assert found["replication"].status == "ok"


BREAKAGES = {
    "no publication": (f"drop publication {PUBLICATION}", "publication", "problem"),
    "deletes not published": (
        f"alter publication {PUBLICATION} set (publish = 'insert, update')",
        "publication",
        "problem",
    ),
    "table not published": (
        f"alter publication {PUBLICATION} drop table posts",
        f"published {TABLE}",
        "problem",
    ),
    "some rows published": (
        f"alter publication {PUBLICATION} set table posts where (is_public)",
        f"row_filter {TABLE}",
        "problem",
    ),
    "some columns published": (
        f"alter publication {PUBLICATION} set table posts (id, title)",
        f"columns {TABLE}",
        "warning",
    ),
    "unlogged": (
        f"alter publication {PUBLICATION} drop table posts; alter table posts set unlogged",
        f"table {TABLE}",
        "problem",
    ),
    "replica identity default": (
        "alter table posts replica identity default",
        f"replica_identity {TABLE}",
        "warning",
    ),
    "replica identity nothing": (
        "alter table posts replica identity nothing",
        f"replica_identity {TABLE}",
        "problem",
    ),
    "no primary key": ("alter table posts drop constraint posts_pkey", f"primary_key {TABLE}", "problem"),
    "no id either": ("alter table posts drop column id", f"primary_key {TABLE}", "problem"),
    "no row-level security": (
        "alter table posts disable row level security",
        f"row_level_security {TABLE}",
        "problem",
    ),
    "no policy": (
        'drop policy "Owners see their posts, everyone sees public ones" on posts',
        f"policy {TABLE} authenticated",
        "problem",
    ),
    "no policy for anon": (
        'alter policy "Owners see their posts, everyone sees public ones" on posts to authenticated',
        f"policy {TABLE} anon",
        "warning",
    ),
    "no grant": ("revoke all on posts from authenticated", f"grant {TABLE} authenticated", "problem"),
    "no grant for anon": ("revoke all on posts from anon", f"grant {TABLE} anon", "warning"),
    "no usage of the schema": (
        "revoke usage on schema public from public, authenticated",
        f"grant {TABLE} authenticated",
        "problem",
    ),
    "the role owns the table": ("alter table posts owner to authenticated", "role authenticated", "warning"),
}


@pytest.mark.parametrize(("breaking", "name", "status"), BREAKAGES.values(), ids=BREAKAGES)
async def test_what_is_broken_is_named_and_its_fix_mends_it(
    breaking: str, name: str, status: str, published: str
) -> None:
    await execute(published, breaking)
    finding = (await look(published))[name]
    assert finding.status == status
    assert finding.fix.endswith(";")
    await execute(published, finding.fix)
    mended = (await look(published)).get(name)
    assert mended is None or mended.status == "ok"


async def test_after_a_problem_what_depends_on_it_is_skipped_with_the_reason(published: str) -> None:
    await execute(published, "alter table posts disable row level security; revoke all on posts from anon")
    found = await look(published, tables=f"{TABLE},public.missing")
    assert found["table public.missing"].status == "problem"
    assert "public.missing" in found["table public.missing"].detail
    assert found["primary_key public.missing"].status == "skipped"
    assert found["replication"].status == "skipped"
    assert (found[f"decision {TABLE} anon"].status, found[f"decision {TABLE} authenticated"].status) == (
        "skipped",
        "skipped",
    )
    assert found[f"decision {TABLE} anon"].detail == f"anon may not read {TABLE}"


async def test_a_view_is_no_table(published: str) -> None:
    await execute(published, "create view seen as select * from posts")
    found = await look(published, tables="public.seen")
    assert found["table public.seen"].status == "problem"
    assert "not a table" in found["table public.seen"].detail


async def test_a_policy_that_cannot_be_decided_is_named(published: str) -> None:
    await execute(published, "create policy chance on posts as restrictive for select using (ctid is not null)")
    found = await look(published)
    assert found[f"decision {TABLE} authenticated"].status == "problem"
    assert "ctid" in found[f"decision {TABLE} authenticated"].detail


EVALUATED = """
    create table members (user_id uuid, org int, primary key (user_id, org));
    create table secrets (user_id uuid primary key);
    create function is_open(org int) returns bool language plpgsql as 'begin return org = 7; end;';
    create table papers (id int primary key, org int, is_public bool);
    create policy public on papers using (is_public);
    create policy all_of_it on papers to anon using (true);
    create policy members on papers using (org in (select m.org from members m where m.user_id = auth.uid()));
    create policy secret on papers using (exists (select from secrets s where s.user_id = auth.uid()));
    create policy open on papers using (is_open(org) or random() < 0);
    create policy impossible on papers using (ctid is null);
    create policy of_nobody on papers to service_role using (xmin is null);
    alter table papers enable row level security, replica identity full;
    grant select on members, secrets, papers to anon, authenticated;
"""


@pytest.fixture
async def evaluated(published: str) -> str:
    """The address of a database with policies of all kinds on `public.papers`."""
    connection = await asyncpg.connect(published)
    await connection.execute(EVALUATED)
    await connection.close()
    return published


async def test_how_each_policy_is_evaluated_is_told_and_how_long_what_it_reads_is_believed(evaluated: str) -> None:
    await execute(evaluated, f"alter publication {PUBLICATION} add table papers, members")
    found = await look(evaluated, tables="public.papers", fact_seconds=2)
    assert found["evaluation public.papers"].status == "warning"
    assert found["evaluation public.papers"].detail == (
        "Who sees rows of public.papers is evaluated: all_of_it the same for every row; "
        "impossible not at all (column ctid, which no change brings); "
        "members by index (believed until public.members changes); "
        "open by database (asked each time, since pg_catalog.random is declared volatile; "
        "believed for 2 s, since public.is_open cannot be looked into); "
        "public by row; "
        "secret by fact (believed for 2 s, since public.secrets is not followed)."
    )


async def test_tables_that_policies_read_are_told_and_whether_they_are_followed(evaluated: str) -> None:
    await execute(evaluated, f"alter publication {PUBLICATION} add table papers, members where (org > 0)")
    await execute(evaluated, "drop policy impossible on papers")  # which leaves nothing to be read
    found = await look(evaluated, tables="public.papers")
    assert "followed public.papers" not in found
    for table in ("public.members", "public.secrets"):
        finding = found[f"followed {table}"]
        assert finding.status == "warning"
        assert "believed for 5 s (BRIDGE_FACT_SECONDS)" in finding.detail
        await execute(evaluated, finding.fix)
    mended = await look(evaluated, tables="public.papers")
    assert {mended[f"followed {table}"].status for table in ("public.members", "public.secrets")} == {"ok"}
    assert "secret by fact (believed until public.secrets changes)" in mended["evaluation public.papers"].detail


async def test_with_the_supabase_source_no_table_that_policies_read_is_followed(evaluated: str) -> None:
    await execute(evaluated, "drop policy impossible on papers")
    found = await look(
        evaluated, tables="public.papers", source="supabase", supabase_url="http://127.0.0.1:1", supabase_key="x"
    )
    assert (found["followed public.members"].status, found["followed public.members"].fix) == ("warning", "")
    assert "supabase source" in found["followed public.members"].detail


async def test_a_rule_stands_in_for_the_policies(published: str) -> None:
    await execute(published, "alter table posts disable row level security")
    rule = orjson.dumps({TABLE: "is_public"}).decode()
    found = await look(published, policies=rule)
    assert not failed(found.values())
    assert f"policy {TABLE} anon" not in found
    broken = await look(published, policies=orjson.dumps({TABLE: "no_such_column"}).decode())
    assert broken["policies"].status == "problem"
    assert broken[f"decision {TABLE} anon"].status == "skipped"
    unknown = await look(published, policies=orjson.dumps({TABLE: "auth.who() = user_id"}).decode())
    assert unknown[f"auth_functions {TABLE}"].status == "problem"
    assert "auth.who()" in unknown[f"auth_functions {TABLE}"].detail


async def test_partitions_need_the_name_of_their_table(database: str) -> None:
    await execute(
        database,
        "create table parts (id int primary key, note text) partition by range (id);"
        "create table parts_1 partition of parts for values from (0) to (10);"
        "alter table parts replica identity full; alter table parts enable row level security;"
        "create policy everybody on parts for select using (true); grant select on parts to anon, authenticated;"
        f"create publication {PUBLICATION} for table parts",
    )
    tables = {"tables": "public.parts"}
    found = await look(database, **tables)
    assert found["partitions"].status == "problem"
    assert found["replica_identity public.parts"].fix == "ALTER TABLE public.parts_1 REPLICA IDENTITY FULL;"
    for name in ("partitions", "replica_identity public.parts"):
        await execute(database, found[name].fix)
    mended = await look(database, **tables)
    assert not failed(mended.values())
    assert mended["replica_identity public.parts"].status == "ok"


async def test_columns_that_never_arrive_and_columns_that_arrive_as_text_are_told(published: str) -> None:
    await execute(
        published,
        "create type pair as (a int, b int);"
        "alter table posts add column long bool generated always as (length(title) > 9) stored, add column both_ pair",
    )
    found = await look(published)
    assert (found[f"columns {TABLE}"].status, "(long)" in found[f"columns {TABLE}"].detail) == ("warning", True)
    assert "both_ (pair)" in found[f"column_types {TABLE}"].detail


STORED = "alter table posts add column long bool generated always as (length(title) > 9) stored"
VIRTUAL = "alter table posts add column long bool generated always as (length(title) > 9) virtual"
DEFAULT = "alter table posts replica identity default"
SET_STORED = f'ALTER PUBLICATION "{PUBLICATION}" SET (publish_generated_columns = stored);'
FULL = "ALTER TABLE public.posts REPLICA IDENTITY FULL;"
AGAIN = " ".join(f'ALTER PUBLICATION "{PUBLICATION}" {verb} TABLE public.posts;' for verb in ("DROP", "ADD"))
GENERATED = {
    "stored": (f"{DEFAULT}; {STORED}", "warning", f"{SET_STORED} {FULL}"),
    "stored, and whole": (STORED, "problem", SET_STORED),
    "stored, and listed": (
        f"{DEFAULT}; {STORED}; alter publication {PUBLICATION} set table posts (id, title, long)",
        "warning",
        f"{SET_STORED} {AGAIN} {FULL}",
    ),
    "virtual": (f"{DEFAULT}; {VIRTUAL}", "warning", ""),
    "virtual, and whole": (VIRTUAL, "problem", "ALTER TABLE public.posts REPLICA IDENTITY DEFAULT;"),
    "of another publication": (f"{DEFAULT}; {STORED}; create publication theirs for all tables", "warning", ""),
}


@pytest.mark.parametrize(("changing", "status", "fix"), GENERATED.values(), ids=GENERATED)
async def test_no_replica_identity_is_advised_under_which_postgres_18_refuses_updates(
    changing: str, status: str, fix: str, published: str
) -> None:
    await since_18(published)
    await execute(published, changing)
    finding = (await look(published))[f"replica_identity {TABLE}"]
    assert (finding.status, finding.fix) == (status, fix)
    assert ("refuses every UPDATE" in finding.detail) is (status == "problem" or not fix)
    await execute(published, finding.fix)
    await execute(published, UPDATES)
    mended = (await look(published))[f"replica_identity {TABLE}"]
    assert mended.status == ("ok" if fix and "DEFAULT" not in fix else "warning")


async def test_fix_publishes_generated_columns_where_updates_would_be_refused_otherwise(database: str) -> None:
    await since_18(database)
    await execute(database, f"{STORED}; create table plain (id int primary key)")
    done, failures = await apply_fixes(settings_for(database))
    assert (len(done), failures) == (1, [])
    assert done[0].endswith("WITH (publish_via_partition_root = true, publish_generated_columns = stored);")
    await execute(database, UPDATES)
    assert (await look(database))[f"columns {TABLE}"].status == "ok"

    await execute(database, f"drop publication {PUBLICATION}; create publication {PUBLICATION} for table plain")
    wanted = (await look(database, tables=f"{TABLE},public.plain"))[f"published {TABLE}"].fix
    done, failures = await apply_fixes(settings_for(database, tables=f"{TABLE},public.plain"))
    assert (" ".join(done), failures) == (wanted, [])
    await execute(database, UPDATES)


async def test_fix_publishes_no_table_of_which_postgres_would_refuse_updates_then(database: str) -> None:
    await since_18(database)
    await execute(database, VIRTUAL)
    done, failures = await apply_fixes(settings_for(database))
    assert done == []
    assert "REPLICA IDENTITY DEFAULT" in failures[0].detail
    await execute(database, DEFAULT)
    assert (await apply_fixes(settings_for(database)))[1] == []
    await execute(database, UPDATES)


UPDATES = """
    insert into posts (user_id, title) values (gen_random_uuid(), 'of a kind');
    update posts set title = 'of another';
    delete from posts
"""


async def since_18(database: str) -> None:
    """Skip the test on a Postgres that has nothing to publish generated columns with."""
    connection = await asyncpg.connect(database)
    version = connection.get_server_version().major
    await connection.close()
    if version < 18:
        pytest.skip(f"Postgres {version} publishes no generated columns")


async def test_roles_that_are_missing_or_bound_by_no_policy_are_told(published: str, namespace: str) -> None:
    missing = namespace.replace("-", "_")
    roles = {"roles": f"authenticated,service_role,{missing}"}
    found = await look(published, **roles)
    assert found["role service_role"].status == "warning"
    assert "BYPASSRLS" in found["role service_role"].detail
    assert found[f"role {missing}"].status == "problem"
    try:
        await execute(published, found[f"role {missing}"].fix)
        mended = await look(published, **roles)
        assert mended[f"role {missing}"].status == "ok"
        assert mended[f"grant {TABLE} {missing}"].status == "problem"
    finally:
        await execute(published, f"drop role {missing}")


async def test_a_role_that_the_login_role_may_not_take_is_told(published: str, namespace: str) -> None:
    login = namespace.replace("-", "_")
    await execute(published, f"create role {login} login noinherit; grant anon to {login}")
    try:
        as_login = urlsplit(published)._replace(netloc=f"{login}@{urlsplit(published).netloc.partition('@')[2]}")
        found = await look(as_login.geturl())
        assert found["role anon"].status == "ok"
        assert found["role authenticated"].fix == f'GRANT "authenticated" TO "{login}";'
        assert found["replication"].status == "problem"
        assert f'ALTER ROLE "{login}" REPLICATION' in found["replication"].detail
        await execute(published, found["role authenticated"].fix)
        assert (await look(as_login.geturl()))["role authenticated"].status == "ok"
    finally:
        await execute(published, f"drop role {login}")


# -- the slot ----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def reading(database: str, namespace: str, owner: str) -> AsyncIterator[None]:
    """Somebody reads the slot."""
    source = PostgresSource(
        database, slot=namespace.replace("-", "_"), publication=PUBLICATION, tables=[TABLE], transaction_rows=1000
    )
    async with source.open(None, owner=owner):
        yield


async def test_a_slot_tells_who_reads_it(published: str, namespace: str) -> None:
    async with reading(published, namespace, f"{namespace}/1"):
        found = await look(published, namespace)
        assert found["slot"].status == "ok"
        assert f"read by {namespace}/1" in found["slot"].detail
    async with reading(published, namespace, "another/1"):
        found = await look(published, namespace)
        assert found["slot"].status == "problem"
        assert "another/1 (role postgres, from 127.0.0.1, pid " in found["slot"].detail

    async def is_free() -> bool:
        return "Nobody" in (await look(published, namespace))["slot"].detail

    await eventually(is_free)


async def test_a_slot_of_somebody_else_is_told(published: str, namespace: str) -> None:
    slot = namespace.replace("-", "_")
    await execute(published, f"select pg_create_physical_replication_slot('{slot}')")
    try:
        found = await look(published, namespace)
        assert found["slot"].status == "problem"
        assert "BRIDGE_SLOT" in found["slot"].detail
    finally:
        await execute(published, f"select pg_drop_replication_slot('{slot}')")


async def test_a_lost_slot_is_dropped_by_fix(namespace: str) -> None:
    with running(EmbeddedPostgres(options={"max_slot_wal_keep_size": "1MB"})) as server:
        await install_schema(server.dsn())
        settings = settings_for(server.dsn(), namespace)
        assert await apply_fixes(settings) == (
            [f'CREATE PUBLICATION "{PUBLICATION}" FOR TABLE {TABLE} WITH (publish_via_partition_root = true);'],
            [],
        )
        slot = settings.slot
        await execute(server.dsn(), f"select pg_create_logical_replication_slot('{slot}', 'pgoutput')")
        for _ in range(3):
            await execute(server.dsn(), "select pg_logical_emit_message(false, '', ''); select pg_switch_wal()")
        await execute(server.dsn(), "checkpoint")
        found = await look(server.dsn(), namespace)
        assert found["slot_limit"].status == "ok"
        assert found["slot"].status == "problem"
        assert "lost" in found["slot"].detail
        dropped = f"SELECT pg_drop_replication_slot('{slot}');"
        assert found["slot"].fix == dropped
        assert await apply_fixes(settings) == ([dropped], [])
        assert not failed((await look(server.dsn(), namespace)).values())
        assert await apply_fixes(settings) == ([], [])


async def test_fix_says_what_it_could_not_mend(database: str) -> None:
    done, failures = await apply_fixes(settings_for(database, tables=f"{TABLE},public.missing"))
    assert done == []
    assert [finding.status for finding in failures] == ["problem"]
    assert "public.missing" in failures[0].detail


# -- the server --------------------------------------------------------------------------------------------------------


async def test_a_server_without_logical_replication_and_without_free_slots_is_told(namespace: str) -> None:
    options = {"wal_level": "replica", "max_replication_slots": "0"}
    with running(EmbeddedPostgres(options=options)) as server:
        await install_schema(server.dsn())
        found = await look(server.dsn(), namespace)
        assert found["wal_level"].status == "problem"
        assert found["replication_slots"].status == "problem"
        assert found["replication"].status == "skipped"
        fixes = (found[name].fix for name in ("wal_level", "replication_slots", "slot_limit"))
        await execute(server.dsn(), "".join(fixes))
        assert (await look(server.dsn(), namespace))["slot_limit"].status == "ok"  # the others need a restart


async def test_an_unreachable_server_skips_what_needs_it(published: str) -> None:
    with reserve_port() as holder:
        found = await look(f"postgresql://postgres:hush@127.0.0.1:{holder.getsockname()[1]}/postgres")
    assert found["database"].status == "problem"
    assert "IPv6" in found["database"].detail
    assert set(await look(published)) - {"slot_lag"} <= set(found)
    skipped = {finding.detail for finding in found.values() if finding.status == "skipped"}
    assert skipped == {"the database cannot be reached"}


async def test_a_wrong_password_is_told_and_never_shown(namespace: str, tmp_path: Path) -> None:
    with running(EmbeddedPostgres()) as server:
        await execute(server.dsn(), "create role carol login password 'right'")
        rules = next(server.directory.glob("data/pg_hba.conf"))
        rules.write_text("host all carol 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        await execute(server.dsn(), "select pg_reload_conf()")
        address = f"postgresql://carol:not-it-at-all@127.0.0.1:{server.port}/postgres"

        async def is_refused() -> bool:
            return (await look(address, namespace))["database"].status == "problem"

        await eventually(is_refused)
        result = run("check", folder=tmp_path, environment=environment(address))
        assert result.returncode == 1
        assert "refuses the user or the password" in result.stdout
        assert result.stdout.count("skipped ") == 1, "what has one reason is one line"
        assert "not-it-at-all" not in result.stdout + result.stderr


async def test_behind_a_pooler_replication_is_what_fails(published: str) -> None:
    with running(PgBouncer(published)) as pooler:
        found = await look(pooler.dsn)
    assert "pooler" in found["database"].detail
    assert {name for name, finding in found.items() if finding.status == "problem"} == {"replication"}
    assert "pooler" in found["replication"].detail


# -- Redis -------------------------------------------------------------------------------------------------------------

REDIS_NAMES = ("redis", "redis_version", "redis_commands", "redis_eviction", "redis_persistence", "redis_clock")


async def redis_findings(database: str, url: str) -> dict[str, Finding]:
    found = await look(database, redis_url=url)
    return {name: finding for name, finding in found.items() if name.startswith("redis")}


async def command(url: str, line: Sequence[str]) -> None:
    client = Redis.from_url(url)
    try:
        await client.execute_command(*line)  # type: ignore[no-untyped-call]
    finally:
        await client.aclose()


async def test_a_redis_that_drops_keys_is_a_problem_and_one_without_a_disk_a_warning(published: str) -> None:
    with running(EmbeddedValkey(options={"maxmemory-policy": "allkeys-lru"})) as server:
        found = await redis_findings(published, server.url)
        assert found["redis_eviction"].status == "problem"
        assert "allkeys-lru" in found["redis_eviction"].detail
        assert found["redis_persistence"].status == "warning"
        for name in ("redis_eviction", "redis_persistence"):
            await command(server.url, found[name].fix.split())
        assert {f.status for f in (await redis_findings(published, server.url)).values()} == {"ok"}

        with running(EmbeddedValkey(options={"replicaof": f"127.0.0.1 {server.port}"})) as replica:
            refused = (await redis_findings(published, replica.url))["redis_commands"]
            assert refused.status == "problem"
            assert "read-only replica" in refused.detail

            async def is_counted() -> bool:
                return "has 1 replica." in (await redis_findings(published, server.url))["redis_replicas"].detail

            await eventually(is_counted)


async def test_a_redis_user_that_may_not_write_is_a_problem(published: str) -> None:
    with running(EmbeddedValkey()) as server:
        await command(server.url, ["ACL", "SETUSER", "eve", "on", ">hush-hush", "~*", "&*", "+@all", "-eval"])
        found = await redis_findings(published, server.url.replace("redis://", "redis://eve:hush-hush@"))
        assert found["redis_commands"].status == "problem"
        assert "ACL SETUSER" in found["redis_commands"].detail
        assert "hush" not in str(found)


async def test_a_redis_that_is_not_there_skips_the_rest(published: str) -> None:
    with reserve_port() as holder:
        found = await redis_findings(published, f"redis://:hush@127.0.0.1:{holder.getsockname()[1]}")
    assert found["redis"].status == "problem"
    assert {found[name].status for name in REDIS_NAMES[1:]} == {"skipped"}
    assert "hush" not in str(found)


async def test_checking_leaves_no_key_in_redis(published: str, redis_url: str, namespace: str) -> None:
    await look(published, namespace, redis_url=redis_url)
    client = Redis.from_url(redis_url)
    try:

        async def is_empty() -> bool:
            return not await client.keys(f"*{namespace}*")

        await eventually(is_empty)
    finally:
        await client.aclose()


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_exit_status_is_1_with_a_problem_and_0_once_fix_has_mended_it(database: str, tmp_path: Path) -> None:
    settings = environment(database)
    broken = run("check", folder=tmp_path, environment=settings)
    assert broken.returncode == 1
    assert f"problem  publication: There is no publication {PUBLICATION}" in broken.stdout
    assert "\n         CREATE PUBLICATION" in broken.stdout
    assert "\x1b" not in broken.stdout, "no colours where it is no terminal"

    mended = run("check", "--fix", "--json", folder=tmp_path, environment=settings)
    assert mended.returncode == 0
    document = orjson.loads(mended.stdout)
    assert document["ok"] is True
    assert document["done"][0].startswith("CREATE PUBLICATION")
    assert {"name", "status", "detail", "fix"} == set(document["findings"][0])
    assert all(finding["status"] != "problem" for finding in document["findings"])

    again = run("check", "--fix", folder=tmp_path, environment=settings)
    assert again.returncode == 0
    assert "done" not in again.stdout
    for result in (broken, mended, again):
        assert SECRET not in result.stdout + result.stderr
        assert result.stderr == ""


def test_the_exit_status_is_2_with_a_bad_setting(database: str, tmp_path: Path) -> None:
    settings = environment(database, BRIDGE_PING_SECONDS="often")
    told = run("check", folder=tmp_path, environment=settings)
    assert (told.returncode, told.stdout) == (2, "")
    assert "BRIDGE_PING_SECONDS" in told.stderr
    as_json = run("check", "--json", folder=tmp_path, environment=settings)
    assert as_json.returncode == 2
    document = orjson.loads(as_json.stdout)
    assert (document["ok"], document["findings"][0]["name"]) == (False, "settings")
    assert "BRIDGE_PING_SECONDS" in document["findings"][0]["detail"]
