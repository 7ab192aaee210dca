"""Watches how much WAL Postgres keeps because of the slot, and gives the slot up before that fills the disk.

It looks from every process, whoever leads: WAL piles up just when nobody can read, because the broker is away. A slot
that was given up is made anew by the next leader, which finds that its stream does not continue the history: everybody
is told to `resync` once. A full disk would stop the user's database instead.

Layer: adapters. May import: words, sources.*.
Sources: PostgreSQL documentation, "pg_replication_slots" and `max_slot_wal_keep_size`, which does the same from within
the server, where it is set.
"""

import asyncio
import logging
from typing import Final, NoReturn

from realtime_bridge.errors import BridgeError
from realtime_bridge.sources.postgres_catalog import Primary, connected, translated

logger = logging.getLogger(__name__)

WATCH_SECONDS: Final = 5.0
_WARN_AT: Final = 0.5
"""The part of what may be kept at which people are told."""


class SlotWatch:
    """Looks at one slot, for ever.

    Args:
        most_bytes: of WAL that Postgres may keep for it.
        namespace: of the bridges whose slot it is: the reader of another one is left alone.

    Attributes:
        kept_bytes: of WAL that Postgres kept for it at the last look.
    """

    def __init__(self, dsn: str, slot: str, *, most_bytes: int, namespace: str) -> None:
        self.kept_bytes = 0
        self._dsn = dsn
        self._slot = slot
        self._most = most_bytes
        self._namespace = namespace
        self._is_warned = False

    async def run(self) -> NoReturn:
        """Look every `WATCH_SECONDS`. That Postgres cannot be asked now is for others to report."""
        while True:
            try:
                async with connected(self._dsn) as primary:
                    with translated():
                        await self._look(primary)
            except BridgeError as error:
                logger.debug("the slot cannot be looked at", extra={"reason": error.detail})
            await asyncio.sleep(WATCH_SECONDS)

    async def _look(self, primary: Primary) -> None:
        self.kept_bytes = (await primary.slot_status(self._slot)).lag_bytes
        details = {"slot": self._slot, "bytes": self.kept_bytes, "most": self._most}
        if self.kept_bytes > self._most:
            if await self._give_up(primary):
                logger.error("replication slot given up: Postgres kept too much WAL for it", extra=details)
            return
        is_much = self.kept_bytes > self._most * _WARN_AT
        if is_much and not self._is_warned:
            logger.warning("Postgres keeps much WAL for the replication slot", extra=details)
        self._is_warned = is_much

    async def _give_up(self, primary: Primary) -> bool:
        """Drop the slot, ending its reader first; returns whether it is gone by this. Somebody else's is left alone."""
        state = await primary.slot(self._slot)
        if state is None or state.is_foreign:
            return False
        if state.active_pid is not None:
            if not (state.holder or "").startswith(f"{self._namespace}/"):
                return False  # its reader says so itself
            await primary.terminate(state.active_pid)
        await primary.drop_slot(self._slot)
        return True
