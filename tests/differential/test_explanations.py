"""What is explained of policies, part by part, is what Postgres says of each part: for random rows and users."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from realtime_bridge.database import CALLER_SEARCH_PATH, Database, claim_settings
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.case import Case
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.explanation import ExplainedPart, ExplainedPolicy, Outcome, explain
from tests.differential.ground import ground
from tests.differential.test_differential import SEED, Record
from tests.differential.world import ROLES

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(180)]

PAIRS = 6
RECURSIVE = "public.endless"
"""Its policy reads the table itself, and so is another one where the table's policies do not hold."""
OUTCOMES = {True: Outcome.TRUE, False: Outcome.FALSE, None: Outcome.NULL}

_OPEN = """
alter table {0} disable row level security;
grant select on {0} to public;
grant usage on schema private to public;
set local search_path = {1};
set local timezone = 'UTC'
"""


async def say(
    connection: "asyncpg.Connection[Any]", case: Case, conditions: Sequence[ExplainedPolicy | ExplainedPart]
) -> list[Outcome]:
    """What conditions come to, for the user, over the row as it stands: nothing keeps it from the user here."""
    name, key = case.table.name, int(str(case.value("id")))
    settings = dict(zip(("claims", "claim.sub", "claim.role", "claim.email"), claim_settings(case.claims), strict=True))
    found: list[Outcome] = []
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute(_OPEN.format(name, CALLER_SEARCH_PATH))
    for setting, value in settings.items():
        await connection.execute("select set_config($1, $2, true)", f"request.jwt.{setting}", value)
    await connection.execute("select set_config('role', $1, true)", case.claims.role)
    for condition in conditions:
        try:
            async with connection.transaction():
                truth = await connection.fetchval(f"select ({condition.sql}\n) from {name} where id = $1", key)
        except asyncpg.PostgresError:
            found.append(Outcome.ERROR)
        else:
            found.append(OUTCOMES[truth])
    await transaction.rollback()
    return found


def policy_agrees(policy: ExplainedPolicy, said: Outcome) -> bool:
    """Whether a policy may come to what is told of it. Which of its parts Postgres looks at first is its own affair."""
    fails = {part.outcome for part in policy.parts} & {Outcome.ERROR, Outcome.UNKNOWN} or said is Outcome.ERROR
    return bool(fails) or policy.outcome is (Outcome.TRUE if said is Outcome.TRUE else Outcome.NOT_TRUE)


def part_agrees(part: ExplainedPart, said: Outcome) -> bool:
    """Whether a part may come to what is told of it. A sub-select may end before it comes to what fails in it; what is
    asked about the user beforehand does not, and then shows nothing."""
    fails = part.outcome is Outcome.UNKNOWN or (part.outcome is Outcome.ERROR and "SELECT" in part.sql)
    return fails or part.outcome is said


async def test_every_policy_and_every_part_of_it_comes_to_what_postgres_says(
    database: str, namespace: str, record_property: Record
) -> None:
    chance = random.Random(SEED)
    told: Counter[str] = Counter()
    wrong: list[str] = []
    async with ground(database, namespace.replace("-", "_"), SEED) as field, Database(database) as pool:
        changes, users = await field.insert(), field.world.users
        asking = Asking(pool.transaction, ROLES)
        connection = await asyncpg.connect(database)
        described = await Catalog(pool.transaction).read([name for name in field.names if name != RECURSIVE], ROLES)
        for name, table in described.items():
            own = [change for change in changes if change.relation.name == name]
            for change, user in zip(chance.choices(own, k=PAIRS), chance.sample(users, PAIRS), strict=True):
                case = Case(table, user, change.relation, change.new or ())
                policies = [p for p in (await explain(case, None, asking)).policies if p.outcome is not None]
                parts = [part for policy in policies for part in policy.parts]
                told.update(part.outcome.value for part in parts)
                for policy, said in zip(policies, await say(connection, case, policies), strict=True):
                    if not policy_agrees(policy, said):
                        wrong.append(f"{name}: {policy.sql} is {said}, and not {policy.outcome}: {case}")
                for part, said in zip(parts, await say(connection, case, parts), strict=True):
                    if not part_agrees(part, said):
                        wrong.append(f"{name}: {part.sql} is {said}, and not {part.outcome}: {case}")
        await connection.close()
    record_property("differential", f"DIFFERENTIAL_SEED={SEED}: {told.total()} parts, {dict(told)}")
    assert not wrong, "\n".join(wrong)
