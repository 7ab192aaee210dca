"""What is known of a user is not used for longer than it holds: facts and remembered answers, over two replicas.

One test a line of "fact and memo staleness": what policies refer to is followed in the order of commits, directly,
through functions and through the policies of other tables; by key where there is one; what cannot be followed has a
time to live; while something is in doubt nothing is told on it.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import asyncpg
import httpx
import pytest

from realtime_bridge.change import Position
from tests.clients import bearer, http, open_socket, receive, receive_data
from tests.integration.test_races import Copy, copies_of, fold
from tests.services import eventually, token
from tests.worlds import World, world

pytestmark = pytest.mark.integration

ADA, BOB = (f"{letter}0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11" for letter in "ab")

POLICIES: Mapping[str, str] = {
    "directly": "team in (select m.team from members m where m.user_id = auth.uid())",
    "by_exists": "exists (select from members m where m.team = by_exists.team and m.user_id = auth.uid())",
    "by_function": "team in (select my_teams())",
    "by_policy": "exists (select from seats s where s.team = by_policy.team)",
    "by_all": "(select enabled from switches where name = 'open') and team = 1",
    "by_row": "member_of(team)",
    "by_two": "team in (select m.team from members m where m.team < by_two.id and m.user_id = auth.uid())",
    "gated": "team in (select m.team from members m, gate g where m.user_id = auth.uid())",
    "by_parent": "exists (select from shows s where s.team = by_parent.team and s.is_public)",
    "by_nameless_key": "is_seated(team)",
    "opaquely": "opaque(team)",
    "by_claim": "cleared(team)",
}
REFERRED = ["members", "seats", "switches", "gate", "shows"]
NAMELESS = "chairs"
"""Its old rows are told by a key that does not name the user."""
SCHEMA = """
    create table members (user_id uuid, team int, primary key (user_id, team));
    create table seats (team int primary key, deleted bool);
    create table switches (name text primary key, enabled bool);
    create table gate (id int primary key);
    create table shows (team int primary key, is_public bool);
    create table chairs (id int primary key, user_id uuid, team int);
    create function my_teams() returns setof int language sql stable security definer set search_path = '' as
      $$ select m.team from public.members m where m.user_id = auth.uid() $$;
    create function member_of(wanted int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members m where m.team = wanted and m.user_id = auth.uid()) $$;
    create function is_seated(wanted int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.chairs c where c.team = wanted and c.user_id = auth.uid()) $$;
    create function opaque(wanted int) returns bool language plpgsql stable security definer set search_path = '' as
      $$ begin return public.member_of(wanted); end $$;
    create function cleared(wanted int) returns bool language plpgsql stable set search_path = '' as
      $$ begin return (auth.jwt() ->> 'clearance')::int >= wanted; end $$;
    create policy own on members for select using (user_id = auth.uid());
    create policy taken on seats for select using (not deleted and team in (select my_teams()));
    create policy everybody on switches for select using (true);
    create policy everybody on gate for select using (true);
    create policy everybody on shows for select using (true);
    insert into seats values (1, false), (2, false);
    insert into switches values ('open', true);
    insert into gate values (1);
"""
SCHEMA += "".join(
    f"create table {name} (id int primary key, team int, secret text); create policy p on {name} using ({policy});"
    for name, policy in POLICIES.items()
)
SCHEMA += "".join(
    f"alter table {table} replica identity full, enable row level security; grant select on {table} to authenticated;"
    for table in [*REFERRED, *POLICIES]
)

ENDS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ["directly", "by_exists", "by_function", "by_policy", "by_row", "by_two"],
        (f"insert into members values ('{BOB}', 1)", f"delete from members where user_id = '{BOB}'"),
    ),
    "by_parent": (
        "insert into shows values (1, true) on conflict (team) do update set is_public = true",
        "update shows set is_public = false",
    ),
    "by_nameless_key": (f"insert into chairs values (1, '{BOB}', 1)", "delete from chairs"),
    "by_all": (
        "update switches set enabled = true where name = 'open'",
        "update switches set enabled = false where name = 'open'",
    ),
}
"""Table → what lets Bob see the rows of team 1, and what ends that."""


@asynccontextmanager
async def replicas(
    database: str, namespace: str, redis_url: str, table: str, *, followed: bool = True, **settings: str
) -> AsyncIterator[World]:
    """Two bridges that serve one table; the publication carries what its policy refers to, or does not."""
    names = [f"public.{name}" for name in (*REFERRED, NAMELESS)] if followed else []
    async with world(
        database, namespace, SCHEMA, [f"public.{table}"], followed=names, redis_url=redis_url, **settings
    ) as it:
        yield it


@pytest.mark.parametrize("table", ENDS)
async def test_nothing_is_shown_on_a_fact_beyond_the_commit_that_ended_it(
    database: str, namespace: str, redis_url: str, table: str
) -> None:
    begin, end = ENDS[table]
    async with replicas(database, namespace, redis_url, table) as it:
        copies = await copies_of(it, BOB, table=table)
        for number in range(10, 50, 10):
            await it.admin.execute(
                f"begin; {begin}; commit; begin; insert into {table} values ({number}, 1, 'seen'); commit"
            )
            await fold(*copies)
            await it.admin.execute(f"update {table} set secret = 'seen again' where id = {number}")
            await fold(*copies)
            await it.admin.execute(
                f"begin; {end}; commit; begin; insert into {table} values ({number} + 1, 1, 'unseen'); commit"
            )
            await fold(*copies)
        for copy in copies:
            assert set(copy.shown) == {"seen", "seen again"}
            assert set(copy.resyncs) == {"visibility_changed"}


async def test_what_the_policy_of_another_table_lets_through_is_followed_too(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "by_policy") as it:
        await it.admin.execute(f"insert into members values ('{BOB}', 1)")
        await it.met()
        copies = await copies_of(it, BOB, table="by_policy")
        await it.admin.execute("insert into by_policy values (1, 1, 'seen')")
        await fold(*copies)
        await it.admin.execute(
            "begin; update seats set deleted = true; commit;"
            "begin; insert into by_policy values (2, 1, 'unseen'); commit"
        )
        await fold(*copies)
        assert [copy.shown for copy in copies] == [["seen"], ["seen"]]


async def test_a_change_of_one_membership_puts_nobody_else_in_doubt(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "directly") as it:
        await it.admin.execute(f"insert into members values ('{ADA}', 1)")
        await it.met()
        of_ada, of_bob = await copies_of(it, ADA, table="directly"), await copies_of(it, BOB, table="directly")
        for number in range(5):
            await it.admin.execute(f"insert into members values ('{BOB}', 1)")
            await it.admin.execute(f"insert into directly values ({number}, 1, 'seen')")
            await fold(*of_ada, *of_bob)
            await it.admin.execute(f"delete from members where user_id = '{BOB}'")
            await fold(*of_ada, *of_bob)
        assert [copy.resyncs for copy in of_ada] == [[], []]
        assert all(copy.resyncs for copy in of_bob)


async def test_what_is_in_doubt_is_held_and_then_answered_by_a_resync(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "gated") as it:
        await it.admin.execute(f"insert into members values ('{BOB}', 1), ('{BOB}', 2)")
        await it.met()
        copies = await copies_of(it, BOB, table="gated")
        await it.admin.execute("insert into gated values (1, 1, 'seen')")
        await fold(*copies)
        other = await asyncpg.connect(database)
        try:
            async with other.transaction():  # nobody can ask for Bob's teams meanwhile
                await other.execute("lock table gate in access exclusive mode")
                await it.admin.execute("delete from members where team = 1")
                await it.admin.execute("insert into gated values (2, 1, 'unseen'), (3, 2, 'held')")
                told = await it.told(*(copy.socket for copy in copies))
        finally:
            await other.close()
        for copy, messages in zip(copies, told, strict=True):
            assert [(m["type"], m["table"]) for m in messages] == [("resync", "public.gated")]
            await copy.fold(messages)

        async def is_shown_again() -> bool:
            await it.admin.execute("update gated set secret = 'seen again' where id = 3")
            await fold(*copies)
            return all("seen again" in copy.shown for copy in copies)

        await eventually(is_shown_again)
        assert all("unseen" not in copy.shown for copy in copies)


async def probe(it: World, copies: list[Copy], secret: str) -> set[bool]:
    """For which copies a new row of team 1 is shown."""
    table = copies[0].table
    await it.admin.execute(f"insert into {table} select count(*), 1, $1 from {table}", secret)
    told = await it.told(*(copy.socket for copy in copies))
    return {any(m.get("record", {}).get("secret") == secret for m in messages) for messages in told}


@pytest.mark.parametrize("table", ["opaquely", "directly", "by_row"])
async def test_what_cannot_be_followed_ends_with_its_time(
    database: str, namespace: str, redis_url: str, table: str
) -> None:
    async with replicas(
        database, namespace, redis_url, table, followed=table == "opaquely", BRIDGE_FACT_SECONDS="1"
    ) as it:
        copies = await copies_of(it, BOB, table=table)
        for _ in range(2):
            await eventually(lambda: is_for_all(it, copies, shown=False))  # an answer to be remembered
            await it.admin.execute(f"insert into members values ('{BOB}', 1)")
            await eventually(lambda: is_for_all(it, copies, shown=True))
            await it.admin.execute("delete from members")


async def is_for_all(it: World, copies: list[Copy], *, shown: bool) -> bool:
    return await probe(it, copies, "a secret") == {shown}


async def test_without_a_time_to_live_the_database_is_asked_each_time(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "opaquely", BRIDGE_FACT_SECONDS="0") as it:
        copies = await copies_of(it, BOB, table="opaquely")
        for number in range(5):
            await it.admin.execute(f"insert into members values ('{BOB}', 1)")
            assert await probe(it, copies, f"seen {number}") == {True}
            await it.admin.execute("delete from members")
            assert await probe(it, copies, f"unseen {number}") == {False}


@pytest.mark.parametrize("table", ["by_row", "opaquely", "by_function"])
async def test_a_function_that_is_replaced_decides_anew(
    database: str, namespace: str, redis_url: str, table: str
) -> None:
    name, returns, yes = {
        "by_row": ("member_of(wanted int)", "bool", "select true"),
        "opaquely": ("opaque(wanted int)", "bool", "select true"),
        "by_function": ("my_teams()", "setof int", "select 1"),
    }[table]
    no = f"{yes} where false" if table == "by_function" else "select false"
    async with replicas(database, namespace, redis_url, table, BRIDGE_FACT_SECONDS="3600") as it:
        copies = await copies_of(it, BOB, table=table)
        for body, shown in [(yes, True), (no, False), (yes, True)]:
            await it.admin.execute(
                f"create or replace function {name} returns {returns} language sql stable as $$ {body} $$"
            )
            await eventually(lambda: is_for_all(it, copies, shown=shown))  # noqa: B023 - awaited in this turn


async def test_tokens_of_one_user_share_no_answer_that_rests_on_other_claims(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "by_claim") as it:
        sockets = [
            await it.connect(token(BOB, clearance=clearance), bridge)
            for bridge in it.bridges
            for clearance in (0, 1, 2)
        ]
        for number in range(3):  # asked, then remembered
            await it.admin.execute(f"insert into by_claim values ({number}, 1, 'one'), (10 + {number}, 2, 'two')")
            told = await it.told(*sockets)
            assert [[m["record"]["secret"] for m in messages] for messages in told] == [[], ["one"], ["one", "two"]] * 2


@pytest.mark.parametrize("table", ["directly", "by_row"])
async def test_who_was_away_is_told_when_what_it_sees_has_changed_meanwhile(
    database: str, namespace: str, redis_url: str, table: str
) -> None:
    async with replicas(database, namespace, redis_url, table) as it:
        await it.admin.execute(f"insert into members values ('{ADA}', 1), ('{BOB}', 1)")
        await it.admin.execute(f"insert into {table} values (1, 1, 'seen')")
        positions = {}
        async with httpx.AsyncClient(timeout=20) as asking:
            for user in (ADA, BOB):
                answer = await asking.get(f"{it.bridge.url}/events?wait=0", headers=bearer(token(user)))
                positions[user] = answer.json()["position"]
        await it.admin.execute(f"delete from members where user_id = '{BOB}'")
        await it.admin.execute(f"insert into {table} values (2, 1, 'unseen')")
        await it.told(await it.connect(token(ADA), it.bridges[1]))  # the other replica has met both
        first = {}
        for user in (ADA, BOB):
            async with open_socket(it.bridges[1].url, token(user), position=positions[user]) as socket:
                assert (await receive(socket))["type"] == "ready"
                first[user] = await receive_data(socket)
        assert (first[ADA]["type"], first[ADA]["record"]["secret"]) == ("INSERT", "unseen")
        assert (first[BOB]["type"], first[BOB].get("reason")) == ("resync", "visibility_changed")
        for bridge in it.bridges:
            async with http(bridge.url, token(BOB)) as client:
                answer = (await client.get(f"/events?wait=0&position={first[BOB]['position']}")).json()
            assert "resync" not in [message["type"] for message in answer["messages"]]


class Poller:
    """One reader that polls, now here and now there.

    Attributes:
        resyncs: how often it was told to read again.
        number: of the entry that it has come to.
    """

    def __init__(self, it: World, user: str) -> None:
        self._it = it
        self._user = user
        self._query = ""
        self.resyncs = self.number = 0

    async def poll(self, limit: int = 500) -> None:
        """One poll of each bridge."""
        for bridge in self._it.bridges:
            async with http(bridge.url, token(self._user)) as client:
                answer = (await client.get(f"/events?wait=0&limit={limit}{self._query}")).json()
            self.resyncs += sum(message["type"] == "resync" for message in answer["messages"])
            self._query = f"&position={answer['position']}"
            self.number = Position.parse(answer["position"]).number


@pytest.mark.parametrize("table", ["directly", "by_row"])
@pytest.mark.parametrize("limit", [1, 500])
async def test_a_poll_is_told_once_that_its_user_sees_otherwise(
    database: str, namespace: str, redis_url: str, table: str, limit: int
) -> None:
    """Twice at most if the answer that tells it ends there, right before the change itself."""
    async with replicas(database, namespace, redis_url, table) as it:
        await it.admin.execute(f"insert into members values ('{BOB}', 1)")
        await it.met()
        poller = Poller(it, BOB)
        await poller.poll()
        await it.admin.execute(f"insert into {table} select n, 1, 'before' from generate_series(1, 5) n")
        await it.admin.execute(f"delete from members where user_id = '{BOB}'")
        await it.admin.execute(f"insert into {table} values (10, 1, 'unseen')")
        await it.met()
        for _ in range(8):
            await poller.poll(limit)
        assert poller.resyncs in ({1} if limit > 1 else {1, 2})


async def test_a_poll_is_told_of_a_policy_that_changed_though_no_row_follows_until_the_history_has_told_it(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "directly") as it:
        await it.admin.execute(f"insert into members values ('{BOB}', 1)")
        await it.met()
        poller = Poller(it, BOB)
        await poller.poll()
        began = poller.number
        await it.admin.execute("alter policy p on directly using (team = 7)")  # which both find out by watching

        async def is_told() -> bool:
            await poller.poll()
            return poller.number > began

        await eventually(is_told)
        await poller.poll()
        assert poller.resyncs > 0
        told = poller.resyncs
        for _ in range(10):
            await poller.poll()
        assert poller.resyncs == told


async def test_who_begins_while_its_facts_cannot_be_read_is_told_what_changes_meanwhile(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url, "gated") as it:
        other = await asyncpg.connect(database)
        try:
            async with other.transaction():
                await other.execute("lock table gate in access exclusive mode")
                socket = await it.connect(token(BOB))  # and reads now
                await it.admin.execute(f"insert into members values ('{BOB}', 1)")
        finally:
            await other.close()
        message = await receive_data(socket)
        assert (message["type"], message["table"]) == ("resync", "public.gated")
