"""The engine shows exactly what Postgres shows: every kind of policy, over random rows, users, changes and policies.

A seed that fails is run again with DIFFERENTIAL_SEED; `make fuzz` tries new ones for as long as it is let.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.schema import install_schema
from tests.differential.comparison import REFUSED, Tally, compare_all
from tests.services import OTHER_POSTGRES, running

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(180)]

SEED = int(os.environ.get("DIFFERENTIAL_SEED") or random.randrange(2**32))

Record = Callable[[str, object], None]
"""Pytest's `record_property`: the closing lines show what is recorded here (conftest.py)."""


def judge(tally: Tally, record: Record) -> None:
    record("differential", f"DIFFERENTIAL_SEED={SEED}: {tally}")
    assert not tally.mismatches
    assert all(table.startswith(REFUSED) for table in tally.refused)
    assert tally.pairs >= 200_000
    assert tally.shown > tally.pairs / 10


async def test_the_engine_shows_exactly_what_postgres_shows(
    database: str, namespace: str, record_property: Record
) -> None:
    judge(await compare_all(database, namespace.replace("-", "_"), SEED), record_property)


@pytest.mark.parametrize("bin_dir", OTHER_POSTGRES, ids=lambda bin_dir: bin_dir.parent.name)
async def test_the_engine_shows_what_other_postgres_show(bin_dir: Path, record_property: Record) -> None:
    with running(EmbeddedPostgres(bin_dir=bin_dir)) as server:
        await install_schema(server.dsn())
        judge(await compare_all(server.dsn(), "differential", SEED), record_property)
