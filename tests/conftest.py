"""Fixtures of the whole suite: engines once a worker, a database and a namespace of its own for every test."""

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.schema import install_schema
from tests.services import fresh_databases, running
from tests.ways import WAYS, Way

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_TEMPLATE = "bridge_template"


# -- several processes -------------------------------------------------------------------------------------------------

TOGETHER = ("tests/browser/", "tests/integration/test_deployment.py")
"""Where tests share what takes long to start, so that one worker has them all. xdist 3.8 has marks for that, which do
nothing since pytest 9.2: https://github.com/pytest-dev/pytest-xdist/issues/1386."""


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
    """Gives each test to the worker that is free next, but for those of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        return next((place for place in TOGETHER if nodeid.startswith(place)), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def pytest_xdist_auto_num_workers() -> int:
    """How many `-n auto` are: one more than there are processors, since many tests wait."""
    return (os.cpu_count() or 1) + 1


# -- engines -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running Postgres for this worker's tests. A test that kills or freezes one starts its own."""
    with running(EmbeddedPostgres()) as server:
        yield server


@pytest.fixture(scope="session")
def _template(postgres: EmbeddedPostgres) -> str:
    with psycopg.connect(postgres.dsn(), autocommit=True) as admin:
        admin.execute(f"create database {_TEMPLATE}")
    asyncio.run(install_schema(postgres.dsn(_TEMPLATE)))
    return _TEMPLATE


@pytest.fixture
def make_database(postgres: EmbeddedPostgres, _template: str) -> Iterator[Callable[[], str]]:
    """Makes databases with the sample schema and returns their addresses; all are dropped after the test."""
    with fresh_databases(postgres, _template) as make:
        yield make


@pytest.fixture
def database(make_database: Callable[[], str]) -> str:
    """The address of a fresh database with roles, `auth` and `public.posts`; its user is a superuser."""
    return make_database()


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedValkey]:
    """A running Valkey for this worker's tests, kept apart by `namespace`. A test that freezes it starts its own."""
    with running(EmbeddedValkey()) as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    return valkey.url


@pytest.fixture
def namespace() -> str:
    """A prefix for keys, slots and channels that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, database: str, redis_url: str, namespace: str) -> Way:
    """All four ways in turn, or those that a test names with `indirect`."""
    source, broker = request.param.split("-")
    return Way(source, database, redis_url if broker == "valkey" else "", namespace)
