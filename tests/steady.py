"""A writer that never rests and readers that always come back, for tests in which something breaks meanwhile."""

import asyncio
import re
import time
import uuid

import asyncpg
import httpx
from websockets.exceptions import ConnectionClosed

from tests.bridges import BridgeProcess
from tests.clients import Copy, http, open_socket, receive
from tests.services import eventually

ADA = str(uuid.UUID(int=1))


class SteadyWriter:
    """Inserts titles 0, 1, 2 … of one user, some a second, until it is stopped."""

    def __init__(self, database: str) -> None:
        self._database = database
        self.written = 0
        self._stop = asyncio.Event()

    async def run(self) -> None:
        connection = await asyncpg.connect(self._database)
        while not self._stop.is_set():
            await connection.execute("insert into posts (user_id, title) values ($1, $2)", ADA, str(self.written))
            self.written += 1
            await asyncio.sleep(0.01)
        await connection.close()

    def stop(self) -> None:
        self._stop.set()


async def follow_for_ever(copy: Copy) -> None:
    """Follow, and whenever the link ends, come back with the position."""
    while True:
        try:
            async with open_socket(copy.url, copy.token, position=copy.position) as socket:
                while True:
                    await copy.take(await receive(socket, 60))
        except (OSError, ConnectionClosed, httpx.TransportError):
            await asyncio.sleep(0.05)


async def grows(copy: Copy, rows: int = 20, timeout: float = 30) -> None:
    """Wait until a copy has so many rows more."""
    goal = len(copy.rows) + rows
    await eventually(lambda: len(copy.rows) >= goal, timeout)


def titles(copy: Copy) -> list[int]:
    return sorted(int(row["title"]) for row in copy.rows.values())


async def metric(bridge: BridgeProcess, name: str) -> float:
    """One number that a bridge tells of itself."""
    async with http(bridge.url) as client:
        page = (await client.get("/metrics")).text
    found = re.search(rf"^realtime_bridge_{name} (\S+)$", page, re.M)
    assert found is not None, name
    return float(found[1])


async def proven(bridge: BridgeProcess, seconds: float = 1.0) -> None:
    """Wait until it is proven that nothing was missing up to so many seconds from now."""
    until = time.time() + seconds

    async def is_proven() -> bool:
        return await metric(bridge, "complete_until_seconds") > until

    await eventually(is_proven, 30)


async def leads(bridge: BridgeProcess) -> bool:
    return await metric(bridge, "leading") == 1


async def checks(bridge: BridgeProcess) -> dict[str, str]:
    """What a bridge says it cannot do now, with the reasons; empty while it is ready."""
    async with http(bridge.url) as client:
        answer = await client.get("/readyz")
    failed = {name: check["reason"] for name, check in answer.json()["checks"].items() if not check["ok"]}
    assert (answer.status_code == 200) == (not failed)
    return failed
