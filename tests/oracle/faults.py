"""What can be done to bridges, Valkey, Postgres and the links between them, and which resyncs each of that excuses.

Processes are struck by their ids. A bridge that is struck comes back; what its part was, another has to take over
meanwhile.
"""

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import asyncpg
from redis.asyncio import Redis

from tests.oracle.stage import SLOT, Replica, Stage
from tests.oracle.truth import open_connection
from tests.proxies import Proxy
from tests.services import eventually


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        strike: breaks something, keeps it broken for a while, and mends it.
        excuses: reason → how many resyncs of every table it excuses, to every client; no other reason counts. Most
            excuse none.
    """

    name: str
    strike: Callable[[Stage, random.Random], Awaitable[None]]
    excuses: Mapping[str, int] = field(default_factory=dict)


def schedule(seed: int, faults: Sequence[Fault]) -> Iterator[Fault]:
    """All of the faults in random order, and again, for ever; the same for the same seed."""
    chance = random.Random(seed)
    while True:
        yield from chance.sample(faults, len(faults))


# -- bridges -----------------------------------------------------------------------------------------------------------


async def _until_replaced(stage: Stage, former: Replica) -> None:
    """Until another bridge leads."""
    other = next(replica for replica in stage.replicas if replica is not former)
    await eventually(other.leads, 30)


async def _return(replica: Replica) -> None:
    replica.bridge.start()
    await replica.bridge.ready()


async def kill_leader(stage: Stage, chance: random.Random) -> None:
    leader, _ = await stage.roles()
    leader.bridge.kill()
    await _until_replaced(stage, leader)
    await _return(leader)


async def kill_follower(stage: Stage, chance: random.Random) -> None:
    _, follower = await stage.roles()
    follower.bridge.kill()
    await asyncio.sleep(chance.uniform(0, 2))
    await _return(follower)


async def freeze_leader(stage: Stage, chance: random.Random) -> None:
    leader, _ = await stage.roles()
    leader.bridge.signal(signal.SIGSTOP)
    await _until_replaced(stage, leader)
    await asyncio.sleep(chance.uniform(0, 2))
    leader.bridge.signal(signal.SIGCONT)
    await leader.bridge.ready()


async def freeze_follower(stage: Stage, chance: random.Random) -> None:
    _, follower = await stage.roles()
    follower.bridge.signal(signal.SIGSTOP)
    await asyncio.sleep(chance.uniform(1, 6))
    follower.bridge.signal(signal.SIGCONT)
    await follower.bridge.ready()


async def stop_leader(stage: Stage, chance: random.Random) -> None:
    leader, _ = await stage.roles()
    await asyncio.to_thread(leader.bridge.stop)
    await _until_replaced(stage, leader)
    await _return(leader)


async def stop_follower(stage: Stage, chance: random.Random) -> None:
    _, follower = await stage.roles()
    await asyncio.to_thread(follower.bridge.stop)
    await _return(follower)


# -- Valkey ------------------------------------------------------------------------------------------------------------


async def kill_valkey(stage: Stage, chance: random.Random) -> None:
    stage.valkey.kill()
    await asyncio.sleep(chance.uniform(0, 5))
    await asyncio.to_thread(stage.valkey.start)


async def freeze_valkey(stage: Stage, chance: random.Random) -> None:
    stage.valkey.freeze()
    try:
        await asyncio.sleep(10)
    finally:
        stage.valkey.thaw()


async def flush_valkey(stage: Stage, chance: random.Random) -> None:
    async with Redis.from_url(stage.valkey.url) as redis:
        await redis.flushall()


# -- Postgres ----------------------------------------------------------------------------------------------------------


async def restart_postgres(stage: Stage, chance: random.Random) -> None:
    await asyncio.to_thread(stage.postgres.restart)


async def kill_postgres(stage: Stage, chance: random.Random) -> None:
    stage.postgres.kill()
    await asyncio.sleep(chance.uniform(0, 3))
    await asyncio.to_thread(stage.postgres.start)


_END_READER: Final = "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1"


async def end_walsender(stage: Stage, chance: random.Random) -> None:
    connection = await open_connection(stage.postgres.dsn())
    await connection.execute(_END_READER, SLOT)
    await connection.close()


async def drop_slot(stage: Stage, chance: random.Random) -> None:
    connection = await open_connection(stage.postgres.dsn())

    async def dropped() -> bool:
        await connection.execute(_END_READER, SLOT)
        try:
            await connection.execute("select pg_drop_replication_slot($1)", SLOT)
        except asyncpg.ObjectInUseError:  # until its reader has gone, or since it is back
            return False
        return True

    await eventually(dropped)
    await connection.close()


# -- links -------------------------------------------------------------------------------------------------------------


async def cut_clients(stage: Stage, chance: random.Random) -> None:
    for replica in stage.replicas:
        replica.door.cut()


async def _cut(chance: random.Random, *proxies: Proxy) -> None:
    for proxy in proxies:
        proxy.refuses = True
        proxy.cut()
    await asyncio.sleep(chance.uniform(0, 8))
    for proxy in proxies:
        proxy.refuses = False


async def _deafen(chance: random.Random, *proxies: Proxy) -> None:
    for proxy in proxies:
        proxy.is_deaf = True
    await asyncio.sleep(chance.uniform(1, 8))
    for proxy in proxies:
        proxy.is_deaf = False


async def _delay(chance: random.Random, *proxies: Proxy) -> None:
    for proxy in proxies:
        proxy.delay = 0.25
    await asyncio.sleep(chance.uniform(3, 6))
    for proxy in proxies:
        proxy.delay = 0


Struck = Callable[[Replica], Proxy]


def _of_leader(harm: Callable[..., Awaitable[None]], link: Struck) -> Callable[[Stage, random.Random], Awaitable[None]]:
    async def strike(stage: Stage, chance: random.Random) -> None:
        leader, _ = await stage.roles()
        await harm(chance, link(leader))

    return strike


def _of_all(harm: Callable[..., Awaitable[None]], link: Struck) -> Callable[[Stage, random.Random], Awaitable[None]]:
    async def strike(stage: Stage, chance: random.Random) -> None:
        await harm(chance, *map(link, stage.replicas))

    return strike


def _to_valkey(replica: Replica) -> Proxy:
    return replica.to_valkey


def _to_postgres(replica: Replica) -> Proxy:
    return replica.to_postgres


def _door(replica: Replica) -> Proxy:
    return replica.door


_UNDECIDED: Final = {"visibility_changed": 30}
"""While Postgres cannot be asked, what rests on it cannot be decided. Whoever may see such a change is told to read
again: at most once in `BRIDGE_RESYNC_SECONDS`, which are half a second here."""
_AGAIN: Final = {"truncated": 3, "bulk": 3, "visibility_changed": 6}
"""A history that begins anew is given once more what Postgres was not told to forget: that of the last seconds."""
_GAP: Final = {"upstream_gap": 1, "visibility_changed": 2}
"""Among what is missing may be changes of what policies rest on."""

FAULTS: Final = (
    Fault("leader killed", kill_leader),
    Fault("follower killed", kill_follower),
    Fault("leader frozen", freeze_leader),
    Fault("follower frozen", freeze_follower),
    Fault("leader stopped", stop_leader),
    Fault("follower stopped", stop_follower),
    Fault("Valkey killed, its data kept", kill_valkey),
    Fault("Valkey frozen for 10 s", freeze_valkey),
    Fault("Valkey emptied", flush_valkey, {"history_gone": 1, **_AGAIN}),
    Fault("leader cut off from Valkey", _of_leader(_cut, _to_valkey)),
    Fault("all cut off from Valkey", _of_all(_cut, _to_valkey)),
    Fault("leader's link to Valkey deaf", _of_leader(_deafen, _to_valkey)),
    Fault("links to Valkey slow", _of_all(_delay, _to_valkey)),
    Fault("Postgres restarted", restart_postgres, _UNDECIDED),
    Fault("Postgres killed", kill_postgres, _UNDECIDED),
    Fault("walsender ended", end_walsender),
    Fault("slot dropped", drop_slot, _GAP),
    Fault("leader cut off from Postgres", _of_leader(_cut, _to_postgres), _UNDECIDED),
    Fault("all cut off from Postgres", _of_all(_cut, _to_postgres), _UNDECIDED),
    Fault("leader's link to Postgres deaf", _of_leader(_deafen, _to_postgres), _UNDECIDED),
    Fault("links to Postgres slow", _of_all(_delay, _to_postgres), _UNDECIDED),
    Fault("clients cut off", cut_clients),
    Fault("links to clients slow", _of_all(_delay, _door)),
)
