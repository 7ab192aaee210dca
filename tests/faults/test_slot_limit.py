"""WAL that piles up while nobody can read is measured, warned about, and at last given up: the disk is not filled."""

import uuid

import asyncpg
import pytest

from realtime_bridge.dev.engines import EmbeddedValkey
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
                    await connection.execute("select pg_logical_emit_message(false, 'other', repeat('x', 1 << 20))")
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
