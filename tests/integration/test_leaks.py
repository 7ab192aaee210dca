"""Nothing unseen leaks, tried from outside: a real Postgres, a bridge as it is run, and users who may not see.

A row of the table `fence`, which everybody sees, comes after what is tried. History is ordered, so whoever was told of
it has been told all that was ever to be told of what went before.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import ClientConnection

from tests.bridges import BridgeProcess
from tests.clients import Message, http, open_socket, receive
from tests.services import eventually, token
from tests.ways import POSTGRES_WAYS, Way

pytestmark = pytest.mark.integration

ADA, BOB = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "b0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
FENCE = """
    create table fence (id int primary key);
    alter table fence replica identity full, enable row level security;
    create policy everybody on fence using (true);
    grant select on fence to anon, authenticated
"""


class World:
    """A bridge, its database, and users who are connected to it."""

    def __init__(self, admin: "asyncpg.Connection[Any]", bridge: BridgeProcess, sockets: AsyncExitStack) -> None:
        self.admin = admin
        self.bridge = bridge
        self._sockets = sockets
        self.fences = 0

    async def connect(self, bearer_token: str, **query: str) -> ClientConnection:
        socket = await self._sockets.enter_async_context(open_socket(self.bridge.url, bearer_token, **query))
        assert (await receive(socket))["type"] == "ready"
        return socket

    async def told(self, *sockets: ClientConnection) -> list[list[Message]]:
        """What each of them was told since the last fence, of data and of doubt; nothing can follow that any more."""
        self.fences += 1
        await self.admin.execute("insert into fence values ($1)", self.fences)
        return [await self._up_to_fence(socket) for socket in sockets]

    async def _up_to_fence(self, socket: ClientConnection) -> list[Message]:
        found: list[Message] = []
        while True:
            message = await receive(socket)
            if message["type"] == "INSERT" and message["table"] == "fence":
                if message["record"]["id"] == self.fences:
                    return found
            elif message["type"].isupper() or message["type"] == "resync":
                found.append(message)


@asynccontextmanager
async def world(way: Way, schema: str, tables: Sequence[str]) -> AsyncIterator[World]:
    admin = await asyncpg.connect(way.database)
    try:
        await admin.execute(FENCE)
        await admin.execute(schema)
        served = [*tables, "public.fence"]
        async with way.bridge(*served, BRIDGE_RESYNC_SECONDS="0.01") as bridge, AsyncExitStack() as sockets:
            yield World(admin, bridge, sockets)
    finally:
        await admin.close()


def seen(messages: Sequence[Message]) -> list[tuple[str, Any, Any]]:
    return [(m["type"], m.get("record"), m.get("old_record")) for m in messages]


# -- rights that change while changes flow -----------------------------------------------------------------------------

PAPERS = """
    create schema {0};
    grant usage on schema {0} to authenticated;
    create table {0}.papers (
        id int, owner uuid, reviewer uuid, secret text, primary key (id){1};
    alter table {0}.papers enable row level security;
    alter table {0}.papers replica identity full;
    create policy readers on {0}.papers for select to authenticated using (owner is not null);
    grant select on {0}.papers to authenticated;
"""
PARTITIONED = """) partition by range (id);
    create table {0}.papers_1 partition of {0}.papers for values from (0) to (100);
    alter table {0}.papers_1 replica identity full"""
INSERT = "insert into {0}.papers values (2, '" + ADA + "', '" + BOB + "', 'unseen')"
HIDE = "alter policy readers on {0}.papers using (owner = auth.uid())"
ANEW = """
    drop table {0}.papers;
    create table {0}.papers (id int primary key, owner uuid, reviewer uuid, secret text);
    alter table {0}.papers enable row level security;
    alter table {0}.papers replica identity full;
    create policy readers on {0}.papers for select to authenticated using (owner = auth.uid());
    grant select on {0}.papers to authenticated;
    alter publication {1} add table {0}.papers;
"""
SWAP = """
    alter table {0}.papers rename owner to before;
    alter table {0}.papers rename reviewer to owner;
    alter table {0}.papers rename before to reviewer;
"""

GRANTED: Mapping[str, frozenset[str]] = {"columns": frozenset({"id"})}
"""What a change of `CHANGES` leaves Bob to read."""

CHANGES: Mapping[str, tuple[bool, str]] = {
    "altered": (False, f"{HIDE}; {INSERT}"),
    "dropped": (False, "drop policy readers on {0}.papers; " + INSERT),
    "restricted": (False, "create policy no on {0}.papers as restrictive using (owner = auth.uid()); " + INSERT),
    "disabled": (False, "alter table {0}.papers disable row level security; " + INSERT),
    "revoked": (False, "revoke select on {0}.papers from authenticated; " + INSERT),
    "columns": (
        False,
        "revoke select on {0}.papers from authenticated; grant select (id) on {0}.papers to authenticated; " + INSERT,
    ),
    "schema": (False, "revoke usage on schema {0} from authenticated; " + INSERT),
    "role": (False, "revoke {0}_role from authenticated; " + INSERT),
    "anew": (False, f"begin; {ANEW}; commit; {INSERT}"),
    "swapped": (False, f"{HIDE}; {SWAP}; {INSERT}"),
    "behind": (False, f"begin; {INSERT}; {HIDE}; commit"),
    "at_once": (False, f"begin; {HIDE}; {INSERT}; commit"),
    "partition": (True, f"{HIDE}; {INSERT}"),
    "partition_revoked": (True, "revoke select on {0}.papers from authenticated; " + INSERT),
    "partition_disabled": (True, "alter table {0}.papers disable row level security; " + INSERT),
}


@pytest.mark.timeout(120)
async def test_after_a_change_of_rights_nothing_is_delivered_on_the_old_ones(way: Way) -> None:
    role = way.namespace.replace("-", "_")
    changes = {name: sql for name, (partitioned, sql) in CHANGES.items() if way.tells_partitions or not partitioned}
    schema = "".join(PAPERS.format(name, PARTITIONED.format(name) if CHANGES[name][0] else ")") for name in changes)
    schema += f"""
        create role {role}; grant {role} to authenticated with inherit true;
        alter policy readers on role.papers to {role};
    """
    try:
        async with world(way, schema, [f"{name}.papers" for name in changes]) as it:
            bob = await it.connect(token(BOB))
            async with http(it.bridge.url, token(BOB)) as client:
                start = (await client.get("/events?wait=0")).json()["position"]
            leaked = {}
            for name, statements in changes.items():
                await it.admin.execute(f"insert into {name}.papers values (1, '{ADA}', '{BOB}', 'seen')")
                (before,) = await it.told(bob)
                assert [m["record"]["secret"] for m in before] == ["seen"], name
                await it.admin.execute(statements.format(name, way.publication).replace("role_role", role))
                if not way.tells_rights:
                    await rights_are_noticed(it, bob, f"{name}.papers", GRANTED.get(name, frozenset()))
                    await it.admin.execute(INSERT.format(name).replace("(2,", "(-1,"))
                (after,) = await it.told(bob)
                leaked[name] = shown(after, GRANTED.get(name, frozenset()))
            assert leaked == {name: [] for name in changes}

            # Who reads on from before is shown by the rights of now, too.
            async with http(it.bridge.url, token(BOB)) as client:
                answer = await client.get(f"/events?table=fence&wait=0&position={start}")
                assert len(answer.json()["messages"]) == it.fences
                for name in changes:
                    answer = await client.get(f"/events?table={name}.papers&wait=0&position={start}")
                    assert shown(answer.json().get("messages", [])) == [], name
            assert "unseen" not in it.bridge.log
    finally:
        connection = await asyncpg.connect(way.database)
        await connection.execute(f"drop owned by {role}; drop role {role}")
        await connection.close()


async def rights_are_noticed(it: World, bob: ClientConnection, table: str, granted: frozenset[str]) -> None:
    """Wait until rows that Bob may not see any more are not shown; nothing has announced that he may not."""
    numbers = count(3)

    async def nothing_is_shown() -> bool:
        await it.admin.execute(f"insert into {table} values ({next(numbers)}, '{ADA}', '{BOB}', 'unseen')")
        (after,) = await it.told(bob)
        return shown(after, granted) == []

    await eventually(nothing_is_shown)


def shown(messages: Sequence[Message], granted: frozenset[str] = frozenset()) -> list[Message]:
    """Those that show a row; of columns that are granted alone, they may."""
    data = [message for message in messages if message["type"] != "resync"]
    images = [(m, {*m.get("record", ()), *m.get("old_record", ())}) for m in data]
    return [message for message, columns in images if not granted or columns - granted]


async def doubt(told: Sequence[Message], socket: ClientConnection) -> Message:
    """The resync among what was told, or else the next one: a doubt may come behind what is certain."""
    for message in told:
        if message["type"] == "resync":
            return message
    while (message := await receive(socket))["type"] != "resync":
        pass
    return message


# -- old rows ----------------------------------------------------------------------------------------------------------

OLD_ROWS = """
    create table composite (a int, b int, owner uuid, secret text, primary key (b, a));
    create table keyless (a int, owner uuid, secret text);
    create table thin (id int primary key, owner uuid, secret text);
    alter table composite replica identity full;
    alter table keyless replica identity full;
    alter table thin alter secret set storage external;
"""


def owned(*tables: str) -> str:
    return "".join(
        f"alter table {table} enable row level security; create policy own on {table} using (owner = auth.uid());"
        f"grant select on {table} to authenticated;"
        for table in tables
    )


async def test_an_old_row_is_told_to_those_alone_who_could_see_it(way: Way) -> None:
    tables = ["composite", "keyless", "thin"]
    async with world(way, OLD_ROWS + owned(*tables), [f"public.{t}" for t in tables]) as it:
        ada, bob = await it.connect(token(ADA)), await it.connect(token(BOB))
        await it.admin.execute(f"insert into composite values (1, 2, '{ADA}', 'of ada')")
        await it.admin.execute(f"update composite set a = 3, owner = '{BOB}', secret = 'of bob'")
        await it.admin.execute("update composite set secret = 'of bob still'")
        for_ada, for_bob = await it.told(ada, bob)
        inserted = {"a": 1, "b": 2, "owner": ADA, "secret": "of ada"}
        taken = {"a": 3, "b": 2, "owner": BOB, "secret": "of bob"}
        assert seen(for_ada) == [("INSERT", inserted, None), ("DELETE", None, {"a": 1, "b": 2})]
        assert for_ada[1]["left"] is True
        assert seen(for_bob) == [
            ("INSERT", taken, None),
            ("UPDATE", taken | {"secret": "of bob still"}, taken),
        ]

        await it.admin.execute(f"insert into keyless values (1, '{ADA}', 'of ada')")
        await it.admin.execute(f"update keyless set owner = '{BOB}', secret = 'of bob'")
        for_ada, for_bob = await it.told(ada, bob)
        if way.tells_keyless:
            assert seen(for_ada)[1:] == [("DELETE", None, {})]
            assert seen(for_bob) == [("INSERT", {"a": 1, "owner": BOB, "secret": "of bob"}, None)]
        else:
            assert shown(for_ada) == shown(for_bob) == []
            assert (await doubt(for_ada, ada))["reason"] == (await doubt(for_bob, bob))["reason"] == "upstream_gap"

        await it.admin.execute("insert into thin values (7, $1, repeat('of ada', 2000))", ADA)
        await it.told(ada, bob)
        await it.admin.execute(f"update thin set id = 8, owner = '{BOB}'")  # the large value is not sent again
        await it.admin.execute("update thin set secret = 'of bob'")
        await it.admin.execute("delete from thin")
        for_ada, for_bob = await it.told(ada, bob)
        assert seen(for_ada) == [("DELETE", None, {"id": 7})]
        assert for_ada[0]["left"] is True
        assert "of ada" not in json.dumps(for_bob)
        assert 7 not in [m.get("old_record", {}).get("id") for m in for_bob]
        assert (await doubt(for_bob, bob))["reason"] == "visibility_changed"  # nobody knows the whole row that enters


@pytest.mark.parametrize("way", POSTGRES_WAYS, indirect=True)
async def test_a_generated_column_is_shown_to_nobody_who_may_not_read_it(way: Way) -> None:
    """Postgres 18 publishes such columns, if it is told to; before that they arrive nowhere."""
    schema = """
        create table bills (
          id int primary key, owner uuid, cents int, secret int generated always as (cents * 7) stored);
        alter table bills replica identity full, enable row level security;
        create policy everybody on bills using (true);
        grant select (id, owner, cents) on bills to authenticated;
        grant select on bills to anon;
    """
    async with world(way, schema, ["public.bills"]) as it:
        ada, stranger = await it.connect(token(ADA)), await it.connect(token(None, role="anon"))
        answers = {}
        for column in ("secret", "nothing", "cents"):
            filtered = {"type": "subscribe", "id": column, "table": "bills", "filter": f"{column}=neq.0"}
            await ada.send(json.dumps(filtered))
            answers[column] = await receive(ada)
        assert [answer["type"] for answer in answers.values()] == ["error", "error", "subscribed"]
        assert answers["secret"]["detail"] == answers["nothing"]["detail"].replace("nothing", "secret")
        await it.admin.execute("insert into bills (id, cents) values (1, 1)")
        await it.admin.execute("update bills set cents = 2")
        await it.admin.execute("delete from bills")
        for_ada, for_stranger = await it.told(ada, stranger)
        told = [message.get("subscriptions") for message in shown(for_ada)]
        assert told.count(None) == len(for_stranger) == 3
        assert ["secret"] not in told
        assert "secret" not in json.dumps(seen(for_ada))
        if it.admin.get_server_version().major >= 18:
            assert [row["secret"] for _, row, _ in seen(for_stranger) if row] == [7, 14]


async def test_a_filter_is_no_oracle_on_rows_that_its_reader_could_not_see(way: Way) -> None:
    schema = (
        "create table guess (id int primary key, owner uuid, secret text); alter table guess replica identity full;"
    )
    async with world(way, schema + owned("guess"), ["public.guess"]) as it:
        answers = {}
        for secret in ("right", "wrong", "later"):
            socket = await it.connect(token(BOB), table="fence")
            subscribe = {"type": "subscribe", "id": "g", "table": "guess", "filter": f"secret=eq.{secret}"}
            await socket.send(json.dumps(subscribe))
            assert (await receive(socket))["type"] == "subscribed"
            answers[secret] = socket
        await it.admin.execute(f"insert into guess values (1, '{ADA}', 'right'), (2, '{ADA}', 'right')")
        await it.admin.execute(f"update guess set owner = '{BOB}', secret = 'later' where id = 1")
        await it.admin.execute("delete from guess where id = 2")
        right, wrong, later = await it.told(*answers.values())
        assert (right, wrong) == ([], [])
        assert seen(later) == [("INSERT", {"id": 1, "owner": BOB, "secret": "later"}, None)]


# -- users who resemble each other -------------------------------------------------------------------------------------


async def test_tokens_of_one_user_with_other_claims_see_each_what_is_theirs(way: Way) -> None:
    schema = """
        create table orgs (id int primary key, org text);
        alter table orgs replica identity full, enable row level security;
        create policy own on orgs using (org = auth.jwt() -> 'app_metadata' ->> 'org');
        grant select on orgs to authenticated;
    """
    async with world(way, schema, ["public.orgs"]) as it:
        of = {org: token(ADA, app_metadata={"org": org}) for org in ("red", "blue")}
        red, blue = await it.connect(of["red"]), await it.connect(of["blue"])
        none = await it.connect(token(ADA, user_metadata={"org": "red"}, org="red"))
        await it.admin.execute("insert into orgs values (1, 'red'), (2, 'blue')")
        told = await it.told(red, blue, none)
        assert [[m["record"]["org"] for m in messages] for messages in told] == [["red"], ["blue"], []]

        await red.send(json.dumps({"type": "auth", "token": of["blue"]}))
        await doubt([], red)
        await it.admin.execute("insert into orgs values (3, 'red'), (4, 'blue')")
        told = await it.told(red, blue)
        assert [[m["record"]["org"] for m in messages] for messages in told] == [["blue"], ["blue"]]

        await blue.send(json.dumps({"type": "auth", "token": token(BOB, app_metadata={"org": "red"})}))
        with pytest.raises(Exception, match="4403"):
            await it.told(blue)
        assert "eyJ" not in it.bridge.log


# -- what cannot be decided --------------------------------------------------------------------------------------------

UNDECIDABLE = {
    "a_row": "create policy p on a_row using (a_row is not null)",
    "a_place": "create policy p on a_place using (ctid is not null)",
    "a_setting": "create policy p on a_setting using (current_setting('request.headers', true) is null)",
    "one_of_two": "create policy p on one_of_two using (true);"
    "create policy q on one_of_two as restrictive using (ctid is not null)",
    "without_key": "create policy p on without_key using (true); revoke select on without_key from authenticated;"
    "grant select (owner) on without_key to authenticated",
    "unprotected": "alter table unprotected disable row level security",
    "without_policy": "",
    "for_others": "create policy p on for_others to anon using (true)",
}


async def test_a_table_that_cannot_be_decided_is_refused_and_not_delivered(way: Way) -> None:
    schema = ""
    for table, policy in UNDECIDABLE.items():
        schema += f"""
            create table {table} (id int primary key, owner uuid, secret text);
            alter table {table} replica identity full, enable row level security;
            grant select on {table} to authenticated;
            {policy};
        """
    async with world(way, schema, [f"public.{table}" for table in UNDECIDABLE]) as it:
        ada = await it.connect(token(ADA), table="fence")
        for table in UNDECIDABLE:
            await ada.send(json.dumps({"type": "subscribe", "id": table, "table": table}))
            answer = await receive(ada)
            assert (answer["type"], answer.get("code"), answer["id"]) == ("error", 4403, table)
        whole = await it.connect(token(ADA))
        for table in UNDECIDABLE:
            await it.admin.execute(f"insert into {table} values (1, '{ADA}', 'unseen')")
            await it.admin.execute(f"update {table} set secret = 'unseen still'")
            await it.admin.execute(f"delete from {table}")
        for messages in await it.told(ada, whole):
            assert messages == []
        assert "unseen" not in it.bridge.log


async def test_an_auth_function_of_ones_own_says_who_somebody_is(way: Way) -> None:
    schema = """
        create or replace function auth.uid() returns uuid language sql stable as
          $$ select (current_setting('request.jwt.claims', true)::jsonb ->> 'person')::uuid $$
    """
    async with world(way, schema, ["public.posts"]) as it:
        bob = await it.connect(token(BOB, person=ADA))
        await it.admin.execute(f"insert into posts (user_id, title) values ('{BOB}', 'unseen'), ('{ADA}', 'seen')")
        (told,) = await it.told(bob)
        assert [m["record"]["title"] for m in told if m["type"] == "INSERT"] == ["seen"]


# -- what others have put into the database ----------------------------------------------------------------------------

TRAPS = """
    create table caught (what text);
    grant insert on caught to public;
    create function public.spring(text) returns void language plpgsql as
      $$ begin raise exception 'caught: %', $1; end $$;
    create function public.format(text, text, text) returns text language plpgsql as
      $$ begin perform public.spring('format'); return ''; end $$;
    create function public.differs(oid, int) returns bool language plpgsql as
      $$ begin perform public.spring('<>'); return true; end $$;
    create operator public.<> (leftarg = oid, rightarg = int, function = public.differs);
    create function public.equals(name, text) returns bool language plpgsql as
      $$ begin perform public.spring('='); return true; end $$;
    create operator public.= (leftarg = name, rightarg = text, function = public.equals);
    create function public.joins(text, text) returns text language plpgsql as
      $$ begin perform public.spring('||'); return ''; end $$;
    create operator public.|| (leftarg = text, rightarg = text, function = public.joins);
    create function public.row_to_json(posts) returns json language plpgsql as
      $$ begin perform public.spring('row_to_json'); return '{}'; end $$;
    create function public.set_config(text, text, bool) returns text language plpgsql as
      $$ begin perform public.spring('set_config'); return ''; end $$;
    create function public.pg_has_role(oid, oid, text) returns bool language plpgsql as
      $$ begin perform public.spring('pg_has_role'); return true; end $$;
    create view public.pg_policy as select * from pg_catalog.pg_policy where false;
    create view public.pg_class as select * from pg_catalog.pg_class where false;
"""


async def test_functions_and_operators_that_fit_better_are_not_called(way: Way) -> None:
    admin = await asyncpg.connect(way.database)
    name = way.database.rpartition("/")[2].partition("?")[0]
    await admin.execute(f"alter database {name} set search_path = public, pg_catalog")
    await admin.close()
    async with world(way, TRAPS, ["public.posts"]) as it:
        ada, bob = await it.connect(token(ADA)), await it.connect(token(BOB))
        async with http(it.bridge.url, token(ADA)) as client:
            answer = await client.post("/posts", json={"title": "mine"})
            assert answer.status_code == 201, answer.text
            assert [row["title"] for row in (await client.get("/posts")).json()] == ["mine"]
        for_ada, for_bob = await it.told(ada, bob)
        assert [m["record"]["title"] for m in for_ada] == ["mine"]
        assert for_bob == []
        assert "caught" not in it.bridge.log


# -- what a stranger can ask -------------------------------------------------------------------------------------------


async def test_a_stranger_learns_nothing_and_the_sample_users_are_not_there(way: Way) -> None:
    async with world(way, "select 1", ["public.posts"]) as it, http(it.bridge.url) as client:
        await it.admin.execute(f"insert into posts (user_id, title) values ('{ADA}', 'unseen')")
        await it.told(await it.connect(token(ADA)))

        async def page() -> str:
            return (await client.get("/metrics")).text

        async def is_counted() -> bool:
            return "realtime_bridge_entries_total 0.0" not in await page()

        await eventually(is_counted)
        ready = (await client.get("/readyz")).text
        for text in (await page(), ready):
            assert not any(word in text for word in ("unseen", ADA, "posts", "postgresql:", "127.0.0.1", way.namespace))
        for path in ("/dev/users.json", "/", "/posts", "/posts/1", "/events"):
            assert (await client.get(path)).status_code in (401, 404), path
