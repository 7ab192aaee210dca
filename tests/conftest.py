"""Fixtures of the whole suite: engines once a run, a database and a namespace of its own for every test."""

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
from hypothesis import settings

from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.schema import install_schema
from tests.services import fresh_databases, running

settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("dev", deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_TEMPLATE = "bridge_template"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A running Postgres for all tests. A test that kills or freezes one starts its own."""
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
    """A running Valkey for all tests, kept apart by `namespace`. A test that kills or freezes one starts its own."""
    with running(EmbeddedValkey()) as server:
        yield server


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> str:
    return valkey.url


@pytest.fixture
def namespace() -> str:
    """A prefix for keys, slots and channels that no other test has."""
    return f"test-{uuid.uuid4().hex[:12]}"
