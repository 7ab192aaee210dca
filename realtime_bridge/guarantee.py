"""Says in plain words what this configuration survives without loss, and what not.

It follows from the settings, from what Redis says of itself, and from how fast the history fills at present. Nothing is
ever lost in silence: what is not survived here is told to readers as a `resync`.

Layer: core. May import: words, broker.base, hub.hub.
Sources: https://redis.io/docs/latest/operate/oss_and_stack/management/persistence/.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, NoReturn

from realtime_bridge.broker.base import Durability
from realtime_bridge.errors import BridgeError
from realtime_bridge.settings import Settings

logger = logging.getLogger(__name__)

_LOOK_SECONDS: Final = 30.0
_LOOKS_KEPT: Final = 60
"""The rate is that of the last half hour."""


class Flow(NamedTuple):
    """What has gone through the history since this process began: entries, and bytes of their bodies."""

    entries: int
    size: int


@dataclass(frozen=True, slots=True)
class Guarantee:
    """Sentences for people.

    Attributes:
        survived: what costs no change and tells nobody to `resync`.
        told: what is told to readers as a `resync`.
    """

    survived: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)


def guarantee(settings: Settings, durability: Durability | None, reach: float) -> Guarantee:
    """What holds with these settings.

    Args:
        settings: of this bridge.
        durability: what the shared broker says of itself; None if the history is in this process's memory.
        reach: seconds for which a reader may be away.
    """
    found = Guarantee()
    is_replayed = settings.source_kind == "postgres"
    _of_source(found, settings)
    if durability is None:
        found.told.append("a restart of this process: its memory holds the history (REDIS_URL is not set)")
    else:
        found.survived.append("the end of any one process of several: another one takes over, readers come back to any")
        _of_redis(found, durability, is_replayed)
    found.survived.append(f"readers that are away for up to {_span(reach)}, at the present rate of changes")
    found.told.append(f"readers that are away for longer than {_span(reach)}: BRIDGE_HISTORY_SIZE, _BYTES and _SECONDS")
    found.told.append(f"a transaction of more than {settings.transaction_rows:,} changes (BRIDGE_TRANSACTION_ROWS)")
    return found


def _of_source(found: Guarantee, settings: Settings) -> None:
    if settings.source_kind == "postgres":
        found.survived.append("restarts of Postgres and breaks of the link to it: the slot keeps what was not read")
        found.told.append("the loss of the replication slot, and a failover of Postgres that does not bring it along")
        return
    found.survived.append(
        "what Supabase Realtime has not told, if it is noticed: tables that have a primary key and "
        f"{settings.repair_column}, and at most {settings.repair_rows:,} rows, are compared with what was told"
    )
    found.told.append(
        "breaks of the link to Supabase Realtime, which keeps nothing for those who are away: of other tables, and of "
        "those of which much has changed"
    )


def _of_redis(found: Guarantee, durability: Durability, is_replayed: bool) -> None:
    again = ": what it loses is read again from Postgres"
    match durability.persistence:
        case "always":
            found.survived.append("restarts and crashes of Redis: every append is on its disk")
        case "every second":
            what = "restarts and crashes of Redis, which may lose its newest second"
            if is_replayed:
                found.survived.append(what + again)
            else:
                found.told.append(what)
        case "snapshots":
            found.told.append("restarts and crashes of Redis: it goes back to its last snapshot (set appendonly yes)")
        case "none":
            found.told.append("restarts and crashes of Redis: it keeps nothing on disk (set appendonly yes)")
        case "unknown":
            found.told.append("perhaps restarts and crashes of Redis: it does not say what it keeps on disk")
    if durability.replicas == 0:
        found.told.append("the loss of Redis' machine: it has no replica")
    elif is_replayed:
        found.survived.append("failovers of Redis within some seconds" + again)
    else:
        found.told.append("failovers of Redis that lose its newest appends")
    if durability.evicts:
        found.told.append("shortage of memory in Redis, which may drop the history (set maxmemory-policy noeviction)")


def _span(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"


class Guarantor:
    """Keeps the guarantee up to date.

    Args:
        ask: asks the shared broker about itself; None if there is none.
        flow: what has gone through the history.

    Attributes:
        guarantee: as of the last look.
    """

    def __init__(
        self, settings: Settings, ask: Callable[[], Awaitable[Durability]] | None, flow: Callable[[], Flow]
    ) -> None:
        self._settings = settings
        self._ask = ask
        self._flow = flow
        self._looks: deque[tuple[float, Flow]] = deque(maxlen=_LOOKS_KEPT)
        self._durability: Durability | None = None if ask is None else Durability()
        self.guarantee = guarantee(settings, self._durability, settings.history_seconds)
        self._logged: Guarantee | None = None  # but for the reach, which moves with the rate of changes

    async def run(self) -> NoReturn:
        """Look again and again; at first, and whenever something else holds, log it."""
        while True:
            if self._ask is not None:
                try:
                    self._durability = await self._ask()
                except BridgeError as error:
                    logger.debug("Redis says nothing of itself", extra={"reason": error.detail})
            self._look()
            await asyncio.sleep(_LOOK_SECONDS)

    def _look(self) -> None:
        self._looks.append((time.monotonic(), self._flow()))
        self.guarantee = guarantee(self._settings, self._durability, self._reach())
        lasting = guarantee(self._settings, self._durability, self._settings.history_seconds)
        if lasting != self._logged:
            self._logged = lasting
            survived, told = "; ".join(self.guarantee.survived), "; ".join(self.guarantee.told)
            logger.info("what is survived, and what is told as a resync", extra={"survived": survived, "told": told})

    def _reach(self) -> float:
        """For how long the history reaches back, if changes go on to come as they have come lately."""
        settings = self._settings
        (began, first), (now, last) = self._looks[0], self._looks[-1]
        entries, size, seconds = last.entries - first.entries, last.size - first.size, now - began
        spans = [settings.history_seconds]
        if entries > 0 and size > 0 and seconds > 0:
            spans += [settings.history_size / entries * seconds, settings.history_bytes / size * seconds]
        return min(spans)
