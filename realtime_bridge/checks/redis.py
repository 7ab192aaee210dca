"""Checks of Redis (or Valkey), which keeps the history.

To add one: write a function of `RedisFacts` and name it in the tuple.

Layer: whole. May import: settings, errors, checks.*, broker.
"""

import re
import time
from dataclasses import dataclass
from typing import Final

from realtime_bridge.broker.redis import RedisBroker, RedisInfo
from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.redis_url import parse_redis_url
from realtime_bridge.checks.clocks import clock_outcome
from realtime_bridge.checks.finding import Finding, Outcome, find, ok, problem, skip, warning
from realtime_bridge.errors import BrokerError, ConfigurationError
from realtime_bridge.parts import make_broker
from realtime_bridge.settings import Settings

OLDEST_VERSION: Final = (6, 2)
_WRITE: Final = "return redis.call('SET', KEYS[1], '1', 'PX', 1)"
_REACHABLE: Final = "redis"


@dataclass(frozen=True, slots=True)
class RedisFacts:
    """What was found.

    Attributes:
        refused: why the bridge's user may not do what it needs; empty if it may.
        clock_offset: seconds by which Redis' clock is ahead of ours.
    """

    info: RedisInfo
    refused: str
    clock_offset: float


def redis_version(facts: RedisFacts) -> Outcome:
    """Streams are trimmed and read back in ways that older ones do not have."""
    version = tuple(int(number) for number in re.findall(r"\d+", facts.info.version)[:2])
    if version < OLDEST_VERSION:
        return problem(f"Redis is {facts.info.version or 'of no known version'}; the bridge needs 6.2 or later.")
    return ok(f"Redis is {facts.info.version}, or compatible with it.")


def redis_commands(facts: RedisFacts) -> Outcome:
    """An ACL may forbid what the bridge does all the time; a replica takes no writes."""
    if facts.refused:
        return problem(f"{facts.refused}: scripts, keys and channels of BRIDGE_NAMESPACE have to be allowed.")
    return ok("Redis runs scripts, writes keys and lets us subscribe.")


def redis_eviction(facts: RedisFacts) -> Outcome:
    """A history that loses keys when memory is short is none."""
    if facts.info.evicts:
        return problem(
            f"maxmemory-policy of Redis is {facts.info.maxmemory_policy or 'unknown'}: when memory is short it drops "
            "keys, the history among them.",
            "CONFIG SET maxmemory-policy noeviction",
        )
    return ok("Redis drops no keys.")


def redis_persistence(facts: RedisFacts) -> Outcome:
    """What a restart of Redis costs."""
    if facts.info.append_only:
        return ok("Redis writes an append-only file.")
    if facts.info.snapshots is False:
        return warning(
            "Redis keeps nothing on disk: when it restarts, every client has to read its tables again.",
            "CONFIG SET appendonly yes",
        )
    told = "saves snapshots" if facts.info.snapshots else "does not tell whether it saves snapshots"
    return ok(f"Redis {told}; what it loses at a crash costs clients one resync.")


def redis_replicas(facts: RedisFacts) -> Outcome:
    """What the death of Redis costs."""
    if not facts.info.replicas:
        return ok("Redis has no replica: while it is away, changes wait.")
    return ok(f"Redis has {facts.info.replicas} replica{'s' * (facts.info.replicas > 1)}.")


def redis_clock(facts: RedisFacts) -> Outcome:
    """Redis' clock dates the history."""
    return clock_outcome("Redis", facts.clock_offset)


REDIS_CHECKS: Final = (
    redis_version,
    redis_commands,
    redis_eviction,
    redis_persistence,
    redis_replicas,
    redis_clock,
)


async def look_at_redis(settings: Settings) -> list[Finding]:
    """Everything about Redis; without one, that there is none."""
    if settings.redis_url is None:
        told = "REDIS_URL is not set: the history is in the memory of one process, and a restart forgets it."
        return [Finding(_REACHABLE, "ok", told)]
    try:
        facts = await _read_facts(settings)
    except (BrokerError, ConfigurationError) as error:
        unreachable = Finding(_REACHABLE, "problem", f"{error}.", "REDIS_URL=redis://host:6379/0")
        return [unreachable, *skip(REDIS_CHECKS, "Redis cannot be used")]
    return [Finding(_REACHABLE, "ok", "Redis answers."), *find(REDIS_CHECKS, facts)]


async def _read_facts(settings: Settings) -> RedisFacts:
    broker = make_broker(settings)
    assert isinstance(broker, RedisBroker), "there is a REDIS_URL"
    async with broker:
        info = await broker.info()
    assert settings.redis_url is not None
    link = Link(parse_redis_url(settings.redis_url.get_secret_value()), settings.namespace)
    await link.open()
    try:
        return RedisFacts(info, await _refusal(link), await _clock_offset(link))
    finally:
        await link.close()


async def _refusal(link: Link) -> str:
    """Try what the bridge does; the key written ends by itself after a millisecond."""
    try:
        await link.command("EVAL", _WRITE, 1, f"{link.prefix}check")
        async with link.subscribed():
            return ""
    except BrokerError as error:
        return str(error)


async def _clock_offset(link: Link) -> float:
    """The answer of the quickest of three questions."""
    answers: list[tuple[float, float]] = []
    for _ in range(3):
        asked, started = time.time(), time.perf_counter()
        seconds, microseconds = await link.command("TIME")
        took = time.perf_counter() - started
        answers.append((took, seconds + microseconds / 1e6 - asked - took / 2))
    return min(answers)[1]
