"""The `postgres` source: an own logical replication slot, streamed as it is written.

Nothing is lost across restarts: the slot keeps what was not acknowledged, and the watermark says what the history has.
A decoded commit may not be visible yet (the walsender can be ahead of every snapshot, for minutes where a synchronous
standby is waited for), so a transaction is given on only when a snapshot of the primary shows it.

Layer: adapters. May import: words, pgoutput, sources.*.
Sources: PostgreSQL documentation, "Logical Decoding" and "Streaming Replication Protocol".
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

import psycopg

from realtime_bridge.change import Control
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.sources.base import SourceBatch
from realtime_bridge.sources.postgres_catalog import (
    Described,
    Moment,
    Primary,
    SlotState,
    SlotStatus,
    connected,
    ensure_publication,
    slot_status,
)
from realtime_bridge.sources.replication import Data, Replication, System, reason_of
from realtime_bridge.sources.replication import connected as replicating
from realtime_bridge.sources.transactions import (
    Assembler,
    BodyBuilder,
    Place,
    Placed,
    Transaction,
    lsn_text,
    parse_watermark,
    watermark_text,
)

__all__ = ["PostgresSource", "PostgresStream", "SlotStatus", "ensure_publication", "slot_status"]

logger = logging.getLogger(__name__)

_BATCH_BODIES: Final = 1000
_BATCH_BYTES: Final = 1 << 20
_FRAMES_A_TURN: Final = 500
_IDLE_SECONDS: Final = 1.0
_FIRST_LOOK_SECONDS: Final = 0.001
_LONGEST_LOOK_SECONDS: Final = 0.25
_STALL_SECONDS: Final = 2.0
_VERIFY_SECONDS: Final = 10.0
_TAKEOVER_SECONDS: Final = 10.0
_NAME_BYTES: Final = 63
