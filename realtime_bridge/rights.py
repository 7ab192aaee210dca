"""Has every replica meet a change of rights at one place of the history, though Postgres tells nobody of it.

Each process finds altered policies by itself, within a second, and some later than others. So the one that leads
appends an entry for each table whose rights have changed: whoever passes it decides by the new ones from then on, and
whoever comes from before it is told to read again. Which rights were told of last is noted beside the history, so that
a change is told of even if the leader ends before it could.

Layer: core. May import: words, broker.base, rows.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NoReturn, Protocol

import orjson

from realtime_bridge.broker.base import NOTE, Broker, RowChange
from realtime_bridge.change import Control
from realtime_bridge.rows import RowIndex

RIGHTS: Final = "*"
"""The table of the row index whose note is of the rights."""
_LOOK_SECONDS: Final = 0.2


@dataclass
class RightsState:
    """What was told of rights, for metrics: how many entries were appended."""

    told: int = 0


class Rights(Protocol):
    """What knows by which rights this process decides."""

    @property
    def rights(self) -> Mapping[str, str]:
        """Table → a digest of its policies and grants, as in every process; without those where it is unknown."""
        ...

    async def outdated(self) -> bool:
        """As `Policy.outdated`."""
        ...


class RightsTeller:
    """Tells the history of changes of rights, during one term of leading.

    Args:
        token: fencing token of the term.

    """

    def __init__(self, broker: Broker, rights: Rights, rows: RowIndex, state: RightsState, token: str) -> None:
        self._state = state
        self._broker = broker
        self._rights = rights
        self._rows = rows
        self._token = token

    async def run(self) -> NoReturn:
        """Tell whatever has changed, for ever.

        Raises:
            BrokerError, LeaseLostError, ForkError: the term is over.
        """
        await self._rows.begun.wait()
        [note] = await self._broker.rows(RIGHTS, [NOTE])
        noted: dict[str, str] = {} if note is None else orjson.loads(note)
        while True:
            found = self._rights.rights
            # What this process has not found yet may have been told of by a leader before it, and is no change then.
            is_news = found.items() - noted.items() and not await self._rights.outdated()
            if is_news and self._rights.rights == found:
                changed = [table for table in found if noted.get(table, found[table]) != found[table]]
                noted |= found
                await self._tell(changed, noted)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _tell(self, tables: list[str], noted: Mapping[str, str]) -> None:
        now = time.time_ns() // 1000  # the same for all, so that whoever meets them reads the catalog once
        bodies = [Control("catalog", table, "visibility_changed", now) for table in tables]
        async with self._rows.turn:
            await self._broker.append(
                self._token, bodies, rows=[RowChange(RIGHTS, NOTE, orjson.dumps(noted, option=orjson.OPT_SORT_KEYS))]
            )
        self._state.told += len(bodies)
