"""From the commit of a row to its arrival at a client, on an idle system with Valkey between.

Decides whether the way of a change may keep its hand-overs (visible-before-append, append, notify, decide, write): each
costs a round trip. The clock starts before the INSERT is sent, so that the commit itself is in the figure; the floor
beside it is the INSERT alone.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from websockets.asyncio.client import connect

CHANGES = 300
PAUSE_SECONDS = 0.02


@asynccontextmanager
async def demo(*arguments: str) -> AsyncIterator[dict[str, Any]]:
    """What `dev --print-env` starts, and its description."""
    command = [sys.executable, "-m", "realtime_bridge", "dev", "--print-env", "--no-writer", "--port", "0", *arguments]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            sys.exit("the demo did not start: try `make demo`")
        yield json.loads(line)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def measure(environment: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Milliseconds from before the INSERT to the client, and for the INSERT alone."""
    user = environment["users"][0]
    arrivals, inserts = [], []
    url = environment["url"].replace("http", "ws", 1) + "/ws"
    database = await asyncpg.connect(environment["database_url"])
    headers = {"Authorization": f"Bearer {user['token']}"}
    async with connect(url, additional_headers=headers, compression=None) as socket:
        await socket.recv()  # ready
        for i in range(CHANGES):
            begin = time.perf_counter()
            await database.execute("insert into posts (user_id, title) values ($1, $2)", user["id"], f"bench {i}")
            inserted = time.perf_counter()
            while json.loads(await socket.recv())["type"] != "INSERT":
                pass
            arrived = time.perf_counter()
            if i >= CHANGES // 10:  # the first ones warm up
                inserts.append((inserted - begin) * 1000)
                arrivals.append((arrived - begin) * 1000)
            await asyncio.sleep(PAUSE_SECONDS)
    await database.close()
    return arrivals, inserts


def line(name: str, values: list[float]) -> str:
    ranked = statistics.quantiles(values, n=100)
    return f"{name:<34} median {statistics.median(values):6.2f} ms   p99 {ranked[98]:6.2f} ms   of {len(values)}"


async def main() -> None:
    for title, arguments in (("two bridges, Valkey between", ["--redis"]), ("one bridge, memory", [])):
        async with demo(*arguments) as environment:
            arrivals, inserts = await measure(environment)
        print(line(f"commit to client, {title}", arrivals))
        print(line("  floor: the INSERT alone", inserts))
