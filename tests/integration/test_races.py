"""Races between what a user may see and what is told: two replicas, and writes that follow each other at once.

A user may be shown an image on a right that came after it, never on one that had ended before it.
"""

import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from websockets.asyncio.client import ClientConnection

from tests.clients import Message
from tests.services import token
from tests.worlds import World, seen, world

pytestmark = pytest.mark.integration

ADA, BOB, EVE = (f"{letter}0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11" for letter in "abe")
TABLES = ["public.papers", "public.letters"]
SCHEMA = """
    create table members (user_id uuid, team int, primary key (user_id, team));
    alter table members replica identity full, enable row level security;
    create policy own on members for select using (user_id = auth.uid());

    create table papers (id int primary key, team int, secret text);
    create policy team on papers for select using (
      team in (select m.team from members m where m.user_id = auth.uid()));

    create table letters (id int primary key, owner uuid, secret text);
    create policy own on letters for select using (owner = auth.uid());

    alter table papers replica identity full, enable row level security;
    alter table letters replica identity full, enable row level security;
    grant select on members, papers, letters to authenticated;
"""


@dataclass
class Copy:
    """A user's copy of a table, folded as docs/protocol.md says; a resync reads the table again, as the user.

    Attributes:
        shown: every text of the column `secret` that was ever sent.
    """

    world: World
    socket: ClientConnection
    user: str
    table: str = "papers"
    rows: dict[int, Any] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    resyncs: list[str] = field(default_factory=list)

    async def fold(self, messages: Sequence[Message]) -> None:
        for message in messages:
            kind, record, old = message["type"], message.get("record"), message.get("old_record")
            if message["table"] not in (self.table, f"public.{self.table}", "*"):
                continue
            self.shown += [image["secret"] for image in (record, old) if image and "secret" in image]
            if kind == "resync":
                self.resyncs.append(message["reason"])
                self.rows = await self.select()
            elif kind == "DELETE":
                assert old is not None
                self.rows.pop(old["id"], None)
            else:
                assert record is not None
                self.rows[record["id"]] = record

    async def select(self) -> dict[int, Any]:
        """What the table shows the user now: nothing, where the user may not even ask."""
        admin = self.world.admin
        try:
            async with admin.transaction():
                await admin.execute("select set_config('request.jwt.claim.sub', $1, true)", self.user)
                await admin.execute("set local role authenticated")
                rows = await admin.fetch(f"select id, row_to_json(t)::text as row from {self.table} t")
                return {row["id"]: json.loads(row["row"]) for row in rows}
        except asyncpg.InsufficientPrivilegeError:
            return {}


async def fold(*copies: Copy) -> None:
    """Let all copies take what they are told up to now, and prove that they are what `SELECT` shows."""
    told = await copies[0].world.told(*(copy.socket for copy in copies))
    for copy, messages in zip(copies, told, strict=True):
        await copy.fold(messages)
        assert copy.rows == await copy.select(), copy.user


async def copies_of(it: World, *users: str, table: str = "papers") -> list[Copy]:
    """One copy for every user and replica."""
    return [Copy(it, await it.connect(token(user), bridge), user, table) for user in users for bridge in it.bridges]


@asynccontextmanager
async def replicas(database: str, namespace: str, redis_url: str) -> AsyncIterator[World]:
    followed = ["public.members"]
    async with world(database, namespace, SCHEMA, TABLES, followed=followed, redis_url=redis_url) as it:
        yield it


async def test_an_image_is_judged_by_itself_however_soon_the_row_is_hidden_or_shown_again(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url) as it:
        copies = await copies_of(it, BOB, table="letters")
        for number in range(20):
            await it.admin.execute(f"""
                begin; insert into letters values ({number}, '{BOB}', 'seen'); commit;
                begin; update letters set owner = '{ADA}', secret = 'unseen' where id = {number}; commit;
                begin; insert into letters values (100 + {number}, '{ADA}', 'unseen'); commit;
                begin; update letters set owner = '{BOB}', secret = 'seen' where id = 100 + {number}; commit;
                begin; update letters set owner = '{ADA}', secret = 'unseen' where id = 100 + {number}; commit;
            """)
            for copy, told in zip(copies, await it.told(*(copy.socket for copy in copies)), strict=True):
                await copy.fold(told)
                row = {"owner": BOB, "secret": "seen"}
                assert seen(told) == [
                    ("INSERT", {"id": number, **row}, None),
                    ("DELETE", None, {"id": number}),
                    ("INSERT", {"id": 100 + number, **row}, None),
                    ("DELETE", None, {"id": 100 + number}),
                ]
                assert copy.rows == {}
                assert set(copy.shown) == {"seen"}


async def test_a_membership_that_ended_in_the_commit_before_shows_nothing(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url) as it:
        await it.admin.execute(f"insert into members values ('{ADA}', 1)")
        await it.met()
        copies = await copies_of(it, ADA, BOB)
        for number in range(0, 100, 10):
            await it.admin.execute(f"insert into members values ('{BOB}', 1)")
            await fold(*copies)
            await it.admin.execute(f"insert into papers values ({number}, 1, 'seen')")
            await fold(*copies)
            await it.admin.execute(f"""
                begin; delete from members where user_id = '{BOB}'; commit;
                begin; insert into papers values ({number} + 1, 1, 'unseen'); commit;
                begin; update papers set secret = 'unseen' where id = {number}; commit;
            """)
            await fold(*copies)
            await it.admin.execute(f"update papers set secret = 'unseen still' where id = {number}")
            await fold(*copies)
        for copy in copies:
            assert set(copy.shown) == ({"seen"} if copy.user == BOB else {"seen", "unseen", "unseen still"})
            assert set(copy.resyncs) == ({"visibility_changed"} if copy.user == BOB else set())


async def test_a_membership_that_ends_in_a_commit_shows_nothing_that_is_written_in_it(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url) as it:
        copies = await copies_of(it, BOB)
        for number in range(0, 50, 10):
            await it.admin.execute(f"insert into members values ('{BOB}', 1)")
            await it.admin.execute(f"insert into papers values ({number}, 1, 'seen')")
            await fold(*copies)
            await it.admin.execute(f"""
                begin;
                insert into papers values ({number} + 1, 1, 'unseen');
                update papers set secret = 'unseen' where id = {number};
                delete from members where user_id = '{BOB}';
                commit;
            """)
            await fold(*copies)
        for copy in copies:
            assert "unseen" not in copy.shown
            assert set(copy.resyncs) == {"visibility_changed"}


async def test_a_membership_that_began_in_the_commit_before_shows_what_follows(
    database: str, namespace: str, redis_url: str
) -> None:
    async with replicas(database, namespace, redis_url) as it:
        await it.admin.execute("insert into papers values (1000, 1, 'from before')")
        copies = await copies_of(it, BOB)
        for number in range(10):
            await it.admin.execute(f"""
                begin; insert into papers values ({number}, 2, 'unseen'); commit;
                begin; insert into members values ('{BOB}', 1); commit;
                begin; insert into papers values (100 + {number}, 1, 'seen'); commit;
            """)
            await fold(*copies)
            for copy in copies:
                assert copy.rows[1000]["secret"] == "from before"
                assert "seen" in copy.shown or copy.resyncs
            await it.admin.execute(f"update papers set secret = 'seen again' where id = 100 + {number}")
            await fold(*copies)
            assert all("seen again" in copy.shown for copy in copies)
            await it.admin.execute("delete from members")
            await fold(*copies)
        assert all("unseen" not in copy.shown for copy in copies)
        assert all(set(copy.resyncs) == {"visibility_changed"} for copy in copies)


POLICY_CHANGES: Mapping[str, tuple[str, str]] = {
    "altered": (
        "alter policy own on letters using (false)",
        "alter policy own on letters using (owner = auth.uid())",
    ),
    "restricted": (
        "create policy no on letters as restrictive using (id < 0)",
        "drop policy no on letters",
    ),
    "revoked": ("revoke select on letters from authenticated", "grant select on letters to authenticated"),
}


@pytest.mark.parametrize("change", POLICY_CHANGES)
async def test_a_policy_that_changed_in_the_commit_before_decides(
    database: str, namespace: str, redis_url: str, change: str
) -> None:
    hide, show = POLICY_CHANGES[change]
    async with replicas(database, namespace, redis_url) as it:
        copies = await copies_of(it, BOB, table="letters")
        for number in range(0, 50, 10):
            await it.admin.execute(f"insert into letters values ({number}, '{BOB}', 'seen')")
            await fold(*copies)
            await it.admin.execute(f"""
                begin; {hide}; commit;
                begin; insert into letters values ({number} + 1, '{BOB}', 'unseen'); commit;
                begin; delete from letters where id = {number} + 1; commit;
            """)
            await fold(*copies)
            await it.admin.execute(f"""
                begin; {show}; commit;
                begin; insert into letters values ({number} + 2, '{BOB}', 'seen'); commit;
            """)
            await fold(*copies)
        for copy in copies:
            assert "unseen" not in copy.shown
            assert set(copy.resyncs) == {"visibility_changed"}


# -- a storm -----------------------------------------------------------------------------------------------------------

USERS = [ADA, BOB, EVE]
TEAMS = range(3)


class Storm:
    """Random commits on memberships and papers, and a book of who could ever have been shown which secret.

    Attributes:
        allowed: secret → users who were in its paper's team when it was written, or at any time since.
    """

    def __init__(self, connection: "asyncpg.Connection[Any]", seed: int) -> None:
        self._connection = connection
        self._random = random.Random(seed)
        self._members: set[tuple[str, int]] = set()
        self._papers: dict[int, int] = {}
        self._teams: dict[str, int] = {}
        self.allowed: dict[str, set[str]] = {}

    async def blow(self, commits: int) -> None:
        """So many commits, sent at once."""
        statements = [self._random.choice([self._membership, self._membership, self._paper])() for _ in range(commits)]
        await self._connection.execute("".join(f"begin; {statement}; commit; " for statement in statements))

    def _membership(self) -> str:
        user, team = self._random.choice(USERS), self._random.choice(TEAMS)
        if (user, team) in self._members:
            self._members.discard((user, team))
            return f"delete from members where user_id = '{user}' and team = {team}"
        self._members.add((user, team))
        for secret, its_team in self._teams.items():
            if its_team == team:
                self.allowed[secret].add(user)
        return f"insert into members values ('{user}', {team})"

    def _paper(self) -> str:
        key, team = self._random.randrange(20), self._random.choice(TEAMS)
        if key in self._papers and self._random.random() < 0.2:
            del self._papers[key]
            return f"delete from papers where id = {key}"
        self._papers[key] = team
        secret = f"secret {len(self.allowed)}"
        self._teams[secret] = team
        self.allowed[secret] = {user for user, its_team in self._members if its_team == team}
        return (
            f"insert into papers values ({key}, {team}, '{secret}') "
            f"on conflict (id) do update set team = {team}, secret = '{secret}'"
        )


@pytest.mark.slow
async def test_nothing_is_shown_on_a_membership_that_had_ended(database: str, namespace: str, redis_url: str) -> None:
    seed = random.randrange(2**32)
    async with replicas(database, namespace, redis_url) as it:
        storm = Storm(it.admin, seed)
        copies = await copies_of(it, *USERS)
        for _ in range(30):
            await storm.blow(20)
            await fold(*copies)
        for copy in copies:
            leaked = [secret for secret in copy.shown if copy.user not in storm.allowed[secret]]
            assert not leaked, f"seed {seed}: {copy.user} was shown {leaked}"
            assert copy.shown
