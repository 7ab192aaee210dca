"""Which server to connect to, where that is for Sentinels or for a cluster to say.

Every new connection asks all of them at once, each with a deadline: one that is frozen or cut off holds nobody up, and
one that has not heard of a failover yet is outvoted. redis-py 8.1 asks one after the other, beginning with the same one
every time, and in a cluster only after an error of its own making; behind the deadline that each command has here, it
would stay for ever with a server that is frozen.

Layer: adapters. May import: nothing of the package.
Sources: SENTINEL GET-MASTER-ADDR-BY-NAME and CLUSTER SLOTS (Redis command reference); "Guidelines for Redis clients
with support for Redis Sentinel"; `Connection` of redis-py 8.1.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol, TypeAlias

from redis import exceptions
from redis.asyncio.connection import Connection, SSLConnection

ASK_SECONDS: Final = 0.5
MOST_ASKED: Final = 8
"""Nodes of a cluster that are asked besides those of the configuration."""

Address: TypeAlias = tuple[str, int]


class NoPrimaryError(exceptions.RedisError):
    """Those who were asked know of no primary."""


class Finder(Protocol):
    """Knows who tells which server is the primary."""

    async def find(self) -> Address:
        """Ask, and return what most say.

        Raises:
            RedisError, OSError, TimeoutError: nobody answers, or nobody knows one.
        """
        ...


class SentinelFinder:
    """Finds the primary of a service.

    Args:
        options: keyword arguments of the connections to the Sentinels.
    """

    def __init__(self, hosts: Sequence[Address], service: str, *, tls: bool, options: dict[str, Any]) -> None:
        self._hosts = hosts
        self._service = service
        self._asker = _Asker(tls=tls, options=options)

    async def find(self) -> Address:
        """See `Finder.find`."""
        answers = await self._asker.ask(self._hosts, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
        return _most_named([(answer[0].decode(), int(answer[1])) for _, answer in answers if answer])


class ClusterFinder:
    """Finds the primary that has a slot.

    Args:
        hosts: of some nodes; others are learned of.
        options: keyword arguments of the connections to the nodes.
    """

    def __init__(self, hosts: Sequence[Address], slot: int, *, tls: bool, options: dict[str, Any]) -> None:
        self._hosts = hosts
        self._learned: set[Address] = set()
        self._slot = slot
        self._asker = _Asker(tls=tls, options=options)

    async def find(self) -> Address:
        """See `Finder.find`."""
        others = sorted(self._learned.difference(self._hosts))
        asked = (*self._hosts, *random.sample(others, min(MOST_ASKED, len(others))))
        answers = await self._asker.ask(asked, "CLUSTER", "SLOTS")
        owners = []
        self._learned.clear()
        for (host, _), ranges in answers:
            for first, last, *nodes in ranges:
                # A node that does not know its own name means the one that it was asked by.
                addresses = [(node[0].decode() if node[0] else host, int(node[1])) for node in nodes]
                self._learned.update(addresses)
                if first <= self._slot <= last:
                    owners.append(addresses[0])
        return _most_named(owners)


class PrimaryConnection(Connection):
    """A connection that finds out, each time that it is made, where to."""

    def __init__(self, *, finder: Finder, **options: Any) -> None:
        super().__init__(**options)
        self._finder = finder

    async def connect(self) -> None:
        """Connect to the primary of now."""
        if not self.is_connected:
            self.host, self.port = await self._finder.find()
        await super().connect()  # type: ignore[no-untyped-call]


class PrimaryTlsConnection(PrimaryConnection, SSLConnection):
    """The same over TLS."""


class _Asker:
    """Puts one question to several servers.

    Args:
        options: keyword arguments of the connections to them.
    """

    def __init__(self, *, tls: bool, options: dict[str, Any]) -> None:
        self._connection_class = SSLConnection if tls else Connection
        self._options = options

    async def ask(self, hosts: Sequence[Address], *command: str) -> list[tuple[Address, Any]]:
        """What those say who answer in time.

        Raises:
            RedisError, OSError, TimeoutError: why nobody does; a refusal if there is one, since it tells more.
        """
        async with asyncio.TaskGroup() as tasks:
            asked = [(address, tasks.create_task(self._ask(address, command))) for address in hosts]
        answers = [(address, task.result()) for address, task in asked]
        failures = [answer for _, answer in answers if isinstance(answer, Exception)]
        if len(failures) == len(answers):
            raise next((f for f in failures if isinstance(f, _REFUSALS)), failures[0])
        return [(address, answer) for address, answer in answers if not isinstance(answer, Exception)]

    async def _ask(self, address: Address, command: Iterable[str]) -> Any:
        """The answer, or what was met instead of one."""
        host, port = address
        connection = self._connection_class(host=host, port=port, **self._options)
        try:
            async with asyncio.timeout(ASK_SECONDS):
                await connection.connect()  # type: ignore[no-untyped-call]
                await connection.send_command(*command)
                return await connection.read_response()
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            return error
        finally:
            await connection.disconnect(nowait=True)


_REFUSALS: Final = (exceptions.AuthenticationError, exceptions.ResponseError)


def _most_named(addresses: Sequence[Address]) -> Address:
    if not addresses:
        raise NoPrimaryError
    return Counter(addresses).most_common(1)[0][0]
