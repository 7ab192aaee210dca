"""WAL that piles up while nobody can read is measured, warned about, and at last given up: the disk is not filled."""

import asyncio
import uuid
from typing import Any

import asyncpg
import pytest

from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.sources import slot_watch
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import open_socket, receive, receive_data
from tests.services import eventually, running, token

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(120)]

ADA = str(uuid.UUID(int=1))
MOST = 24 << 20
KEPT = """
select coalesce(max(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), 0)
from pg_replication_slots where slot_name = $1
"""


async def told(bridge: BridgeProcess, words: str) -> None:
    await eventually(lambda: words in bridge.log, 30)


async def test_a_slot_that_keeps_too_much_is_given_up_as_a_gap(database: str, namespace: str) -> None:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    connection = await asyncpg.connect(database)
    slot = namespace.replace("-", "_")
    settings = {"BRIDGE_NAMESPACE": namespace, "BRIDGE_SLOT": slot, "BRIDGE_SLOT_BYTES": str(MOST)}
    with running(EmbeddedValkey(durable=True)) as valkey:
        async with (
            BridgeProcess(database, REDIS_URL=valkey.url, **settings) as bridge,
            open_socket(bridge.url, token(ADA)) as socket,
        ):
            assert (await receive(socket))["type"] == "ready"
            await connection.execute("insert into posts (user_id, title) values ($1, 'before')", ADA)
            assert (await receive_data(socket))["record"]["title"] == "before"
            valkey.freeze()
            await connection.execute("insert into posts (user_id, title) values ($1, 'meanwhile')", ADA)
            for enough, words in ((MOST * 2 // 3, "keeps much WAL"), (MOST, "given up")):
                while await connection.fetchval(KEPT, slot) < enough:
                    await write(connection)
                await told(bridge, words)
            assert await connection.fetchval(KEPT, slot) < MOST
            valkey.thaw()
            gap = await receive(socket, 60)
            while gap["type"] != "resync":
                gap = await receive(socket, 60)
            assert (gap["table"], gap["reason"]) == ("*", "upstream_gap")
            await bridge.ready()
            await connection.execute("insert into posts (user_id, title) values ($1, 'after')", ADA)
            while (await receive_data(socket, 30))["record"]["title"] != "after":
                pass
    await connection.close()


@pytest.mark.parametrize(
    "make", ["pg_create_physical_replication_slot($1, true)", "pg_create_logical_replication_slot($1, 'pgoutput')"]
)
async def test_a_slot_of_somebody_else_is_left_alone_however_much_it_keeps(
    make: str, database: str, namespace: str, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = namespace.replace("-", "_")
    connection = await asyncpg.connect(postgres.dsn())  # another database than the bridge's
    await connection.execute(f"select {make.replace('$1', repr(slot))}")
    monkeypatch.setattr(slot_watch, "WATCH_SECONDS", 0.01)
    watch = slot_watch.SlotWatch(database, slot, most_bytes=1, namespace=namespace)
    watching = asyncio.create_task(watch.run())
    try:
        for _ in range(2):  # what it finds the second time was there after the first
            await look(watch, connection)
        assert await connection.fetchval(
            "select active_pid is null from pg_replication_slots where slot_name = $1", slot
        )
    finally:
        watching.cancel()
        await connection.execute("select pg_drop_replication_slot($1)", slot)
        await connection.close()


async def look(watch: slot_watch.SlotWatch, connection: Any) -> None:
    """Have the watch find more than it has found before."""
    before = watch.kept_bytes
    await write(connection)
    await eventually(lambda: watch.kept_bytes > before)


async def write(connection: Any) -> None:
    await connection.execute("select pg_logical_emit_message(false, 'other', repeat('x', 1 << 20))")
