"""What every source of changes is.

A source is read by one process at a time: the one that holds the lease. It yields batches; the reader appends each to
the broker before it asks for the next, and acknowledges later, some seconds behind, so that what a failover of the
broker lost can be read again.

Beside it stands a reader of the tables themselves, for the old rows that a source does not bring.

Layer: adapters (contract). May import: words.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

from realtime_bridge.change import Body, Image, Relation


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """What a source found since the last batch, in commit order.

    Attributes:
        bodies: changes and controls; may be empty when there is only proof or something to acknowledge. Everything
            in it is visible to any snapshot taken on the primary from now on.
        watermarks: one a body: handed back to `Source.open(after=…)`, it makes the source continue behind that body.
            An empty text leaves the history's watermark as it is.
        watermark: the same for the whole batch, with which it may have passed more than its bodies; the source never
            acknowledges upstream what lies behind the newest watermark that it was told of.
        acknowledge: opaque; once the batch is safely in the history, `SourceStream.acknowledge` may be called with it.
        proven_until: seconds since 1970: every commit before that time is in this batch or in an earlier one, or is in
            doubt.
        doubts: tables of which changes may be missing, in this batch or before. Whoever reads the source repairs them,
            or tells of them as a `resync`; of what is committed from now on, nothing is missing in later batches.
    """

    bodies: tuple[Body, ...] = ()
    watermarks: tuple[str, ...] = ()
    watermark: str = ""
    acknowledge: int | None = None
    proven_until: float | None = None
    doubts: tuple[str, ...] = ()


class SourceStream(Protocol):
    """An open source: an asynchronous iterator that never ends by itself.

    It yields at least once a second, an empty batch if need be, so that its reader can look after acknowledgements.
    Cancelling the iteration is safe: whatever was not yielded will come again after the next `open`.

    Raises (while iterating):
        SourceError: the source cannot be read any more; open it again, with backoff.
    """

    def __aiter__(self) -> AsyncIterator[SourceBatch]: ...

    def acknowledge(self, acknowledge: int) -> None:
        """Let the source forget everything up to here. Does not wait; sent with the next traffic."""
        ...


class Source(Protocol):
    """Where changes come from.

    Attributes:
        is_lossy: changes may be lost, and those behind them told before that is noticed.
    """

    name: str
    is_lossy: bool

    def open(self, after: str | None, *, owner: str) -> AbstractAsyncContextManager[SourceStream]:
        """Begin to read.

        Where the source cannot prove that it continues right behind `after` (another incarnation, a lost slot, an
        upstream without memory) its first batch begins with a `Control("resync", "*", "upstream_gap")`, or doubts all
        tables.

        Args:
            after: the watermark of the newest entry in the history; None if there is none (then a source whose upstream
                keeps what was not read declares no gap).
            owner: `namespace/fencing token`, by which a successor knows and ends a reader that has lost its lease.

        Raises:
            SourceError: it cannot be read now.
            ConfigurationError: it can never be read like this; the message says what to change.
        """
        ...

    async def check(self) -> None:
        """Prove that the source can be used at all, without beginning to read.

        Raises:
            SourceError: it cannot be read now.
            ConfigurationError: it can never be read like this.
        """
        ...


TEXT_BYTES: Final = 256
"""Longer texts are not kept of rows as they stand: a reader of tables may cut them, if they stay longer than this."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows of a table as they stand.

    Attributes:
        rows: with the texts that the source would bring.
        read_at: microseconds since 1970 by the clock of `Change.commit_time`, with a margin for how well that is known:
            what was committed later the rows do not show.
    """

    rows: Sequence[Image]
    read_at: int


class TableReader(Protocol):
    """Reads tables as they stand, in whatever role sees all rows.

    Raises:
        BridgeError: a table cannot be read now, or not by this reader.
    """

    async def describe(self, table: str) -> Relation | None:
        """A table as the source will describe it; None if only the source can tell, or there is no such table."""
        ...

    def pages(self, relation: Relation) -> AsyncGenerator[Page, None]:
        """Every row that is there from the beginning to the end of the reading, by primary key."""
        ...

    async def rows(self, relation: Relation, keys: Sequence[Sequence[str]]) -> list[Image]:
        """The rows of these keys (at most 50), whole, in any order; those that are not there are left out."""
        ...
