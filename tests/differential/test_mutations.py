"""The differential test finds what it is there to find: each fault that can be planted in the compiler, by one table.

The rows, the users and what Postgres shows them are taken once; every fault then decides one table of them anew.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
import pytest

from realtime_bridge.change import Change
from realtime_bridge.claims import Claims
from realtime_bridge.dev.engines import EmbeddedPostgres
from tests.differential.comparison import Comparison, Tally
from tests.differential.engine import Engine
from tests.differential.ground import ground
from tests.differential.truth import Truth, look
from tests.policy_mutations import MUTATIONS
from tests.services import drop_database

pytestmark = pytest.mark.integration

SEED: Final = 1
FOUND_BY: Final[Mapping[str, str]] = {
    "NOT is dropped": "negated",
    "a comparison with a constant NULL is false": "not_in_list",
    "what is NULL holds": "notes",
    "an absent value is NULL": "thin",
    "restrictive policies are dropped": "notes",
    "a conjunction takes one alternative only": "logic",
    "a disjunction forgets its last part": "notes",
    "numbers are equal as texts": "amounts",
    "NaN is the least number": "ordered_amounts",
    "less and less or equal are exchanged": "ordered_claims",
    "a NULL is in no set, for certain": "not_in_set",
    "the elements of an array are split at commas": "tagged",
    "uuids are equal as they are written": "own",
    "blanks at the end of a char count": "padded",
    "a row of NULLs is not NULL": "places",
    "EXISTS can be NULL": "exists_none",
    "a sub-select loses its other conditions": "exists_one",
    "an answer is kept for another value": "opaque_plpgsql",
    "an answer is kept for another user": "opaque_sql",
    "a value that finds nobody finds everybody": "own",
}
"""Fault → a table whose rows show it. The other faults are those of types that only unit tests bring to memory."""


@dataclass(frozen=True)
class Sample:
    """What was written, who may ask for it, and what Postgres shows whom: after the new rows, and after the changes."""

    dsn: str
    users: Sequence[Claims]
    inserted: Sequence[Change]
    changed: Sequence[Change]
    before: Truth
    now: Truth

    async def compare(self, *tables: str) -> Tally:
        """What the engine makes of these tables now. (No policy refers to a row that was changed.)"""
        names = [f"public.{table}" for table in tables]
        async with Engine.open(self.dsn, names, self.users) as engine:
            comparison = Comparison(engine, self.users)
            inserted = [change for change in self.inserted if change.relation.name in names]
            changed = [change for change in self.changed if change.relation.name in names]
            await comparison.compare(inserted, Truth(), self.before)
            await comparison.compare(changed, self.before, self.now)
            return comparison.tally


@pytest.fixture(scope="module")
def sample(postgres: EmbeddedPostgres, _template: str) -> Iterator[Sample]:
    async def take(dsn: str) -> Sample:
        async with ground(dsn, name, SEED) as there:
            users = there.world.users
            tables = sorted({f"public.{table}" for table in FOUND_BY.values()})
            inserted = await there.insert()
            before = await look(there.connection, users, tables)
            changed = await there.change()
            return Sample(dsn, users, inserted, changed, before, await look(there.connection, users, tables))

    name = f"mutations_{os.getpid()}"
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute(f"create database {name} template {_template}".encode())
        try:
            yield asyncio.run(take(postgres.dsn(name)))
        finally:
            drop_database(admin, name)


def test_faults_enough_are_found() -> None:
    assert len(FOUND_BY.keys() & MUTATIONS.keys()) >= 12


async def test_without_a_fault_nothing_is_found(sample: Sample) -> None:
    tally = await sample.compare(*set(FOUND_BY.values()))
    assert not tally.mismatches, str(tally)
    assert tally.shown


@pytest.mark.parametrize("fault", FOUND_BY)
async def test_a_planted_fault_is_found(sample: Sample, fault: str) -> None:
    with MUTATIONS[fault]():
        tally = await sample.compare(FOUND_BY[fault])
    assert tally.mismatches
