"""Every broker, for whatever its contract says."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from realtime_bridge.broker.base import Broker
from tests.contract.brokers import OpenBrokers, open_memory, open_redis


@pytest.fixture(params=["memory", "redis"])
def brokers(request: pytest.FixtureRequest, namespace: str) -> OpenBrokers:
    if request.param == "memory":
        return open_memory
    url = request.getfixturevalue("redis_url")

    @asynccontextmanager
    async def opened(count: int = 1, **limits: Any) -> AsyncIterator[list[Broker]]:
        async with open_redis(url, namespace, count, **limits) as made:
            yield list(made)

    return opened
