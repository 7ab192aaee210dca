"""A sample of decisions is compared with Postgres: faults of the compiler are found, and newer facts are none."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest

from realtime_bridge.change import Change, Column, Entry, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.policy.predicate import Literal
from realtime_bridge.policy.shadow import Shadow
from tests.services import eventually

pytestmark = pytest.mark.integration

ROLES = ["anon", "authenticated"]
ANN, BOB = (str(uuid.UUID(int=number << 96)) for number in (1, 2))
SCHEMA = f"""
create table members (user_id uuid primary key);
grant select on members to authenticated;
insert into members values ('{ANN}');
create table notes (id int primary key, owner uuid, is_secret bool);
alter table notes enable row level security;
create policy own on notes to authenticated using (owner = auth.uid() and not is_secret);
create policy of_members on notes to authenticated using (
  owner is null and exists (select from members m where m.user_id = auth.uid()));
grant select on notes to authenticated;
"""
NOTES = Relation(
    "public", "notes", (Column("id", "int4"), Column("owner", "uuid"), Column("is_secret", "bool")), (0,), True
)


@pytest.fixture
def admin(database: str) -> Iterator["psycopg.Connection[Any]"]:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
        yield connection


@asynccontextmanager
async def engine(database: str) -> AsyncIterator[tuple[PolicyEngine, Shadow, list[Member]]]:
    """An engine whose shadow checks as soon as there is something to check, and its two members, Ann and Bob."""
    async with Database(database) as opened:
        asking = Asking(opened.transaction, ROLES)
        found = PolicyEngine(["public.notes"], ROLES, {}, Catalog(opened.transaction), asking)
        found.shadow = shadow = Shadow(asking, ROLES, {}, seconds=0.01)
        await found.prepare()
        members = await joined(found)
        checking = asyncio.create_task(shadow.run())
        try:
            yield found, shadow, members
        finally:
            checking.cancel()
            with suppress(asyncio.CancelledError):
                await checking


async def joined(engine: PolicyEngine) -> list[Member]:
    members = [
        engine.join(Claims({"sub": user, "role": "authenticated"}, "authenticated", user, None)) for user in (ANN, BOB)
    ]
    await engine.load(members)
    return members


async def checked_again(shadow: Shadow) -> None:
    before = shadow.checked
    await eventually(lambda: shadow.checked > before)


def inserted(owner: str | None, is_secret: str, number: int = 1) -> Entry:
    change = Change("INSERT", NOTES, None, ("1", owner, is_secret), 0)
    return Entry(number, f"{number}-0", f"{number - 1}-0", change)


async def test_a_compiled_policy_that_differs_is_left_to_postgres_from_then_on(
    database: str, admin: "psycopg.Connection[Any]", caplog: pytest.LogCaptureFixture
) -> None:
    holds = Literal.holds
    with pytest.MonkeyPatch.context() as patch:  # whatever is decided here of the row alone is said to hold
        patch.setattr(Literal, "holds", lambda self, *given: (self.of_row and not self.is_asked) or holds(self, *given))
        async with engine(database) as (policy, shadow, (ann, _)):
            secret = inserted(ANN, "t")
            (wrong,) = await policy.audience([secret])
            assert ann in wrong.new, "the planted fault shows a secret row"
            await eventually(lambda: shadow.distrusted)
            assert (shadow.distrusted, shadow.mismatches) == ({"public.notes"}, 1)
            assert await policy.outdated()
            patch.undo()
            assert (await policy.reload("*")).altered == {"public.notes"}
            assert not await policy.outdated()
            ann, _bob = await joined(policy)
            right, shown = await policy.audience([secret, inserted(ANN, "f", 2)])
            assert (right.new, shown.new) == (frozenset(), {ann})
            assert policy.knowledge.asked > 0, "Postgres decides"
    (told,) = [record for record in caplog.records if "differs from Postgres" in record.message]
    assert ANN not in str(vars(told))


async def test_decisions_of_all_kinds_agree(database: str, admin: "psycopg.Connection[Any]") -> None:
    async with engine(database) as (policy, shadow, _):
        for entry in (inserted(ANN, "f"), inserted(BOB, "t"), inserted(None, "f")):
            await policy.audience([entry])
            await checked_again(shadow)
        assert not shadow.mismatches
        assert not await policy.outdated()


async def test_a_fact_that_changed_since_is_no_fault_of_the_policy(
    database: str, admin: "psycopg.Connection[Any]"
) -> None:
    async with engine(database) as (policy, shadow, (ann, _)):
        admin.execute("delete from members")  # of which the engine has not been told yet
        (audience,) = await policy.audience([inserted(None, "f")])
        assert ann in audience.new
        await eventually(lambda: shadow.checked >= 2)
        await policy.audience([inserted(ANN, "f", 2)])
        await checked_again(shadow)
        assert not shadow.mismatches
