"""`realtime-bridge check` of a Supabase project: what is wrong with it is named, whatever way it misbehaves."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from realtime_bridge.checks import Finding, apply_fixes, failed, run_checks
from realtime_bridge.checks import supabase as checks_module
from realtime_bridge.dev.processes import reserve_port
from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.settings import Settings
from realtime_bridge.sources import supabase_link as link_module
from tests.services import SECRET, token

pytestmark = [
    pytest.mark.integration,
    # supabase 2.34.1 hands its own PostgREST client arguments that that client has deprecated.
    pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter is deprecated:DeprecationWarning:supabase"),
]

POSTS, NOTES = "public.posts", "public.Notes"
OPAQUE = ("sb_secret_service", "sb_publishable_anon")
LEGACY = (token(None, role="service_role"), token(None, role="anon"))
EC_KEY = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True)


@asynccontextmanager
async def project_on(database: str, keys: tuple[str, str] = OPAQUE, **options: Any) -> AsyncIterator[LocalSupabase]:
    service, anon = keys
    async with LocalSupabase(database, jwt_secret=SECRET, service_key=service, anon_key=anon, **options) as project:
        yield project


async def look(project: str, key: str = OPAQUE[0], **fields: Any) -> dict[str, Finding]:
    """What `check` finds, by name, with nothing but the project's address and key unless more is given."""
    given = {
        "supabase_url": project,
        "supabase_key": key,
        "supabase_jwt_secret": SECRET,
        "database_url": None,
        "policies": orjson.dumps(dict.fromkeys(fields.get("tables", POSTS).split(","), "is_public")).decode(),
        **fields,
    }
    findings = await run_checks(Settings.load(env_file=None, **given))
    by_name = {finding.name: finding for finding in findings}
    assert len(by_name) == len(findings), "every finding has a name of its own"
    assert key not in str(findings)
    return by_name


async def execute(database: str, *statements: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def statuses(found: dict[str, Finding], names: Sequence[str]) -> list[str]:
    return [found[name].status for name in names]


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [OPAQUE, LEGACY], ids=["opaque keys", "legacy keys"])
async def test_a_healthy_project_has_no_problem_with_either_kind_of_key(keys: tuple[str, str], database: str) -> None:
    async with project_on(database, keys) as project:
        found = await look(project.url, keys[0])
        assert not failed(found.values())
        names = ["supabase_url", "supabase_key", "rest", f"rest_table {POSTS}", "realtime", "jwks", "policies"]
        assert statuses(found, names) == ["ok"] * len(names)
        assert found["database"].status == "skipped"

        public = await look(project.url, keys[1])
        assert public["supabase_key"].status == "problem"
        assert statuses(public, ["rest", "realtime"]) == ["skipped"] * 2


async def test_with_a_database_its_tables_are_looked_at_too_and_nothing_of_it_is_changed(database: str) -> None:
    async with project_on(database) as project:
        fields = {"database_url": database, "policies": "{}"}
        found = await look(project.url, **fields)
        assert not failed(found.values())
        assert "supabase_realtime" in found["publication"].detail
        assert "slot" not in found
        settings = Settings.load(env_file=None, supabase_url=project.url, supabase_key=OPAQUE[0], database_url=database)
        assert await apply_fixes(settings) == ([], [])

        await execute(database, "alter publication supabase_realtime drop table posts")
        unpublished = (await look(project.url, **fields))[f"published {POSTS}"]
        assert unpublished.status == "problem"
        assert "--fix" not in unpublished.detail, "that publication is not ours to change"


async def test_a_key_that_the_project_refuses_is_told(database: str) -> None:
    async with project_on(database) as project:
        found = await look(project.url, "sb_secret_of_yesterday")
        assert statuses(found, ["supabase_key", "rest", "realtime"]) == ["ok", "problem", "problem"]
        for name in ("rest", "realtime"):
            assert "refuses this key" in found[name].detail


# -- tables ------------------------------------------------------------------------------------------------------------


async def test_each_table_that_is_not_published_is_named_and_the_fix_mends_it(database: str) -> None:
    await execute(database, 'create table "Notes" (id int primary key, is_public bool)')
    tables = {"tables": f"{POSTS},{NOTES}"}
    async with project_on(database) as project:
        found = await look(project.url, **tables)
        assert statuses(found, [f"subscribed {NOTES}", "realtime"]) == ["problem", "ok"]
        assert f"subscribed {POSTS}" not in found

        await execute(database, "alter publication supabase_realtime drop table posts")
        found = await look(project.url, **tables)
        refused = [f"subscribed {NOTES}", f"subscribed {POSTS}"]
        assert statuses(found, [*refused, "realtime"]) == ["problem", "problem", "skipped"]

        await execute(database, *(found[name].fix for name in refused))
        assert not failed((await look(project.url, **tables)).values())


async def test_a_table_that_is_not_there_is_told(database: str) -> None:
    async with project_on(database) as project:
        found = await look(project.url, tables=f"{POSTS},public.missing")
        names = ["rest", f"rest_table {POSTS}", "rest_table public.missing", "subscribed public.missing", "realtime"]
        assert statuses(found, names) == ["ok", "ok", "warning", "problem", "ok"]


async def test_a_canary_table_that_is_missing_is_named_and_the_fix_makes_it(database: str) -> None:
    canary = "public.Canary"
    async with project_on(database) as project:
        found = await look(project.url, canary_table=canary)
        assert statuses(found, [f"canary_table {canary}", "realtime"]) == ["problem", "ok"]
        await execute(database, found[f"canary_table {canary}"].fix)
        assert not failed((await look(project.url, canary_table=canary)).values())


# -- misbehaviour ------------------------------------------------------------------------------------------------------


async def test_a_project_that_stands_still_is_told_and_not_waited_for(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_module, "_REST_SECONDS", 0.2)
    async with project_on(database) as project:
        project.freeze()
        found = await look(project.url)
        assert statuses(found, ["jwks", "rest", "realtime"]) == ["warning", "problem", "skipped"]
        assert "nothing came" in found["rest"].detail
        project.thaw()
        assert not failed((await look(project.url)).values())


async def test_a_project_that_is_not_there_is_told() -> None:
    with reserve_port() as nobody:
        found = await look(f"http://127.0.0.1:{nobody.getsockname()[1]}")
    assert statuses(found, ["rest", "realtime"]) == ["problem", "skipped"]
    assert found["rest"].detail.startswith("SUPABASE_URL: the project does not answer (")


async def test_a_realtime_that_refuses_to_subscribe_is_told_with_its_reason(database: str) -> None:
    async with project_on(database) as project:
        project.refuse_joins("RealtimeRestarting: Realtime is restarting, please standby")
        found = await look(project.url)
        assert statuses(found, ["rest", "realtime"]) == ["ok", "problem"]
        assert "RealtimeRestarting" in found["realtime"].detail


async def test_a_realtime_that_never_says_subscribed_is_not_waited_for(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "OPEN_SECONDS", 0.3)
    monkeypatch.setattr(link_module, "CLOSE_SECONDS", 0.1)
    async with project_on(database) as project:
        project.ignore_joins()
        found = await look(project.url)
        assert found["realtime"].status == "problem"
        assert "did not subscribe in time" in found["realtime"].detail


# -- public keys -------------------------------------------------------------------------------------------------------


async def test_without_public_keys_and_without_a_secret_the_project_has_to_be_asked_and_that_is_told(
    database: str,
) -> None:
    async with project_on(database) as project:
        assert (await look(project.url))["jwks"].status == "ok", "the secret stands in"
        bare = (await look(project.url, supabase_jwt_secret=None))["jwks"]
        assert (bare.status, bare.fix.partition("=")[0]) == ("warning", "SUPABASE_JWT_SECRET")

        project.set_jwks([{**EC_KEY, "kid": "now"}])
        keys = (await look(project.url, supabase_jwt_secret=None))["jwks"]
        assert (keys.status, "ES256" in keys.detail) == ("ok", True)

        project.set_jwks([{**EC_KEY, "kid": "now"}, {**EC_KEY, "kid": "now"}, {"kty": "oct"}])
        some = (await look(project.url, supabase_jwt_secret=None))["jwks"]
        assert some.status == "warning"
        assert "kid is not unique; kty or crv is not accepted" in some.detail


async def test_public_keys_that_cannot_be_fetched_are_a_problem_where_nothing_stands_in_for_them(database: str) -> None:
    async with project_on(database) as project:
        nowhere = {"supabase_jwks_url": f"{project.url}/nowhere"}
        with_secret = (await look(project.url, **nowhere))["jwks"]
        assert (with_secret.status, "status 404" in with_secret.detail) == ("warning", True)
        assert (await look(project.url, supabase_jwt_secret=None, **nowhere))["jwks"].status == "problem"
        wrong = (await look(project.url, supabase_jwks_url="keys.json"))["jwks"]
        assert (wrong.status, "SUPABASE_JWKS_URL" in wrong.detail) == ("problem", True)
