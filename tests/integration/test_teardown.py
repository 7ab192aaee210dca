"""`realtime-bridge teardown`: drops what is the bridge's, all of it, and nothing while somebody uses it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import psycopg
import pytest
from redis.asyncio import Redis

from realtime_bridge.change import Control
from realtime_bridge.parts import make_broker
from realtime_bridge.settings import Settings
from realtime_bridge.sources.postgres import PostgresSource, ensure_publication
from tests.bridges import PUBLICATION, environment
from tests.services import SECRET, eventually

pytestmark = pytest.mark.integration

TABLE = "public.posts"
FOREIGN_KEY = "{somebody-else}:history"


@pytest.fixture
def settings(database: str, redis_url: str, namespace: str) -> Settings:
    fields: dict[str, Any] = {
        "source": "postgres",
        "database_url": database,
        "redis_url": redis_url,
        "supabase_jwt_secret": SECRET,
        "namespace": namespace,
        "slot": namespace.replace("-", "_"),
        "publication": PUBLICATION,
    }
    return Settings.load(env_file=None, **fields)


@pytest.fixture
def call(settings: Settings, tmp_path: Path) -> "Call":
    return Call(settings, tmp_path)


class Call:
    """Calls `realtime-bridge teardown` as an operator does."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        assert settings.database_url is not None
        assert settings.redis_url is not None
        names = {
            "REDIS_URL": settings.redis_url.get_secret_value(),
            "BRIDGE_NAMESPACE": settings.namespace,
            "BRIDGE_SLOT": settings.slot,
        }
        self._environment = environment(settings.database_url.get_secret_value(), **names)
        self._folder = folder

    def __call__(self, *arguments: str, answer: str = "", **settings: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "realtime_bridge", "teardown", *arguments],
            env={**self._environment, **settings},
            input=answer,
            capture_output=True,
            text=True,
            cwd=self._folder,
            timeout=50,
        )


async def make_everything(settings: Settings, database: str) -> None:
    """Slot, publication and keys, as a bridge that has run and was stopped leaves them."""
    await ensure_publication(database, settings.publication, [TABLE])
    connection = await asyncpg.connect(database)
    await connection.execute("select pg_create_logical_replication_slot($1, 'pgoutput')", settings.slot)
    await connection.close()
    async with make_broker(settings) as broker:
        lease = await broker.acquire_lease(ttl=5)
        await broker.append(lease, [Control("resync", TABLE, "upstream_gap", commit_time=0)])
        await broker.release_lease(lease)


async def left(settings: Settings, database: str, redis_url: str) -> tuple[bool, bool, bool]:
    """Whether the slot, the publication and a key of the namespace are there."""
    connection = await asyncpg.connect(database)
    redis = Redis.from_url(redis_url)
    try:
        slots = "select exists (select from pg_replication_slots where slot_name = $1)"
        publications = "select exists (select from pg_publication where pubname = $1)"
        return (
            await connection.fetchval(slots, settings.slot),
            await connection.fetchval(publications, settings.publication),
            bool(await redis.keys(f"{{{settings.namespace}}}*")),
        )
    finally:
        await redis.aclose()
        await connection.close()


async def test_all_of_it_is_dropped_and_nothing_else_and_again_is_nothing(
    settings: Settings, database: str, redis_url: str, call: Call
) -> None:
    await make_everything(settings, database)
    assert await left(settings, database, redis_url) == (True, True, True)
    redis = Redis.from_url(redis_url)
    await redis.set(FOREIGN_KEY, "kept", ex=60)

    result = call("--yes")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"Dropped the replication slot {settings.slot}.",
        f"Dropped the publication {PUBLICATION}.",
        f"Dropped the Redis keys of {settings.namespace}.",
    ]

    async def is_gone() -> bool:  # what a released lease tells those who wait ends by itself
        return await left(settings, database, redis_url) == (False, False, False)

    await eventually(is_gone)
    assert await redis.get(FOREIGN_KEY) == b"kept"
    await redis.aclose()
    again = call("--yes")
    assert (again.returncode, again.stdout) == (0, "There is nothing to drop.\n")


async def test_it_asks_and_no_means_no(settings: Settings, database: str, redis_url: str, call: Call) -> None:
    await make_everything(settings, database)
    for answer in ("n\n", ""):
        refused = call(answer=answer)
        assert refused.returncode == 1
        assert f"Drop the replication slot {settings.slot} and the publication {PUBLICATION} and" in refused.stdout
        assert "Dropped" not in refused.stdout
    assert await left(settings, database, redis_url) == (True, True, True)
    agreed = call(answer="y\n")
    assert agreed.returncode == 0
    assert agreed.stdout.count("Dropped") == 3


async def test_a_slot_in_use_is_refused_with_who_holds_it(
    settings: Settings, database: str, redis_url: str, call: Call
) -> None:
    await make_everything(settings, database)
    source = PostgresSource(database, slot=settings.slot, publication=PUBLICATION, tables=[TABLE])
    async with source.open(None, owner=f"{settings.namespace}/7"):
        result = call("--yes")
    assert result.returncode == 1
    assert f"read by {settings.namespace}/7 (role postgres, from 127.0.0.1, pid " in result.stderr
    assert result.stdout == ""
    assert await left(settings, database, redis_url) == (True, True, True)


async def test_a_leader_of_the_namespace_is_refused(
    settings: Settings, database: str, redis_url: str, call: Call
) -> None:
    await make_everything(settings, database)
    async with make_broker(settings) as broker:
        lease = await broker.acquire_lease(ttl=60)
        result = call("--yes")
        await broker.release_lease(lease)
    assert result.returncode == 1
    assert settings.namespace in result.stderr
    assert await left(settings, database, redis_url) == (True, True, True)


async def test_what_is_somebody_elses_stays(settings: Settings, database: str, call: Call) -> None:
    await ensure_publication(database, "supabase_realtime", [TABLE])
    left_alone = call("--yes", BRIDGE_PUBLICATION="supabase_realtime")
    assert (left_alone.returncode, left_alone.stdout) == (0, "There is nothing to drop.\n")

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("select pg_create_physical_replication_slot(%s)", [settings.slot])
        refused = call("--yes")
        connection.execute("select pg_drop_replication_slot(%s)", [settings.slot])
    assert refused.returncode == 2
    assert "BRIDGE_SLOT" in refused.stderr


async def test_without_redis_nothing_is_dropped_at_all(settings: Settings, database: str, call: Call) -> None:
    await ensure_publication(database, settings.publication, [TABLE])
    result = call("--yes", REDIS_URL="redis://:hush@127.0.0.1:1/0")
    assert result.returncode == 1
    assert "Redis at 127.0.0.1:1" in result.stderr
    assert "hush" not in result.stderr
    with psycopg.connect(database) as connection:
        assert connection.execute("select count(*) from pg_publication").fetchone() == (1,)
