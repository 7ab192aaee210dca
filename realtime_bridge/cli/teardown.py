"""`realtime-bridge teardown`: drops what the bridge has made, and nothing else."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from realtime_bridge.bridge import make_broker
from realtime_bridge.broker.redis import RedisBroker
from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.redis_url import parse_redis_url
from realtime_bridge.checks.facts import Slot, quote, read_publication, read_slot
from realtime_bridge.checks.postgres import SUPABASE_PUBLICATION
from realtime_bridge.database import Database
from realtime_bridge.errors import ConfigurationError, UnavailableError
from realtime_bridge.settings import Settings
