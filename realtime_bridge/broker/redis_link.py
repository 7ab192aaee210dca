"""Commands to Redis: one script per operation, a deadline on everything, and errors that a person understands.

A command that ran into its deadline, or was cancelled, costs its connection: redis-py 8.1 closes it whenever sending
or reading ends in any exception, so that the next caller cannot read a wrong answer (`Connection.send_packed_command`,
`read_response`). Nothing of that is retried: what an append that was cut off has done is known only to Redis. Only what
a server refuses because it is not the primary any more is asked once more, over a new connection.

Layer: adapters. May import: errors, broker.redis_url.
Sources: EVALSHA, ACL and error codes (Redis command reference); redis-py 8.1, redis.exceptions.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from importlib import resources
from typing import Any, Final, TypeAlias

from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot

from realtime_bridge.broker.redis_primary import (
    ClusterFinder,
    Finder,
    NoPrimaryError,
    PrimaryConnection,
    PrimaryTlsConnection,
    SentinelFinder,
)
from realtime_bridge.broker.redis_url import RedisUrl
from realtime_bridge.errors import BrokerError

COMMAND_SECONDS: Final = 2.0
_BYTES_PER_SECOND: Final = 1 << 20
"""A slower link than this to Redis is no link: commands get so much more time for what they carry."""
_ANSWER_BYTES: Final = 1 << 20
_CLOSE_SECONDS: Final = 1.0

_KEYS: Final = (
    "state",
    "history",
    "relations",
    "relations-used",
    "epochs",
    "lease",
    "released",
    "tickets",
    "tickets-touched",
    "sights",
    "sights-told",
    "rows",
)
"""What a namespace holds, in the order in which lua/common.lua names it."""

Argument: TypeAlias = str | bytes | int | float

_IDENTITY: Final = "refuses the user name and password of REDIS_URL, or that there are none"
_PERMISSION: Final = "does not allow its user what the bridge needs (see ACL SETUSER)"
_MEMORY: Final = "is out of memory: raise maxmemory, which has to hold BRIDGE_HISTORY_BYTES and BRIDGE_ROW_INDEX_BYTES"
_REPLICA: Final = "is a read-only replica: point REDIS_URL at the primary, or use redis+sentinel://"
_LOADING: Final = "is still loading its data"
_SILENCE: Final = "does not answer"
_DOWN: Final = "is a cluster that is down"
_ELSEWHERE: Final = "says that another node has what the bridge looks for: a cluster needs redis+cluster://"

_BY_CLASS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (exceptions.AuthenticationError, _IDENTITY),
    (exceptions.NoPermissionError, _PERMISSION),
    (exceptions.BusyLoadingError, _LOADING),
    (exceptions.OutOfMemoryError, _MEMORY),
    (exceptions.ReadOnlyError, _REPLICA),
    (exceptions.MaxConnectionsError, "has too many connections from this process"),
    (exceptions.ClusterDownError, _DOWN),
    (exceptions.AskError, _ELSEWHERE),  # and so is MovedError
    (NoPrimaryError, "does not say which server is its primary"),
    (exceptions.TimeoutError, _SILENCE),
    (TimeoutError, _SILENCE),
)
_BY_CODE: Final = {  # inside a script, redis-py leaves the code to us
    "NOAUTH": _IDENTITY,
    "WRONGPASS": _IDENTITY,
    "NOPERM": _PERMISSION,
    "ACL": _PERMISSION,
    "LOADING": _LOADING,
    "OOM": _MEMORY,
    "READONLY": _REPLICA,
    "MISCONF": "cannot write its data to disk and so refuses to change it",
    "BUSY": "is busy with a script that does not end",
    "NOREPLICAS": "has too few replicas to accept writes",
    "MASTERDOWN": "is a replica that has lost its primary",
    "CLUSTERDOWN": _DOWN,
    "WRONGTYPE": "holds something else under the names that the bridge uses: choose another BRIDGE_NAMESPACE",
    "cluster support disabled": "is no cluster: use redis://",
    "unknown command": "does not know what it is asked: it is no Sentinel, or older than 6.2 (a cluster: 7.0)",
}
_CODE: Final = re.compile(rf"\b({'|'.join(_BY_CODE)})\b")
_NOT_HERE: Final = {_REPLICA, _DOWN, _ELSEWHERE}
"""What is said, and nothing done, by a server that is not the primary any more."""


def explain(error: BaseException) -> str:
    """What is the matter, as the end of a sentence that begins with Redis' address.

    Holds nothing of the error's own message, which may quote what was sent.
    """
    for kind, sentence in _BY_CLASS:
        if isinstance(error, kind):
            return sentence
    if isinstance(error, exceptions.ConnectionError | OSError):
        return "cannot be reached"
    found = _CODE.search(str(error))
    return _BY_CODE[found[1]] if found else f"refuses to work ({type(error).__name__})"


@cache
def _script(name: str, publish: str) -> tuple[str, str]:
    """A script's text and its SHA-1, by which Redis knows it."""
    folder = resources.files("realtime_bridge.broker") / "lua"
    parts = [(folder / f"{part}.lua").read_text("utf-8") for part in ("common", name)]
    text = f"local PUBLISH = '{publish}'\n{''.join(parts)}"
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _options(url: RedisUrl) -> dict[str, Any]:
    # RESP2: on its connections nothing arrives that was not asked for.
    options: dict[str, Any] = {
        "username": url.username,
        "password": url.password,
        "protocol": 2,
        "driver_info": None,
        # Each command has a deadline of ours. With one of redis-py's own it sends through `asyncio.wait_for`, which in
        # Python 3.11 can swallow a cancellation.
        "socket_timeout": None,
        "socket_connect_timeout": COMMAND_SECONDS,
        "retry": Retry(NoBackoff(), 0),
    }
    if url.tls:
        options |= {"ssl": True, **url.tls_options}
    return options


class Link:
    """The way to one Redis, for one namespace.

    Each command under way takes a connection, and none ever waits for one. So whoever asks for clients bounds how many
    do at once (`RedisTicketStore`, `RedisHistory.shared_view`, `READERS` of the hub): about 20 connections in all.

    Attributes:
        prefix: what all keys of the namespace begin with: a hash tag, so that they share one slot of a cluster.
        name: of the history's key, and also of the channel of its notifications.
        relations: the key of the relations by version.
        released: the key of a list on which a released lease is announced.
        index: the key of the sizes of the row index, by the key of each table's fields, which begin with it.
    """

    def __init__(self, url: RedisUrl, namespace: str) -> None:
        self.prefix = f"{{{namespace}}}:"
        self.name = f"{self.prefix}history"
        self.relations = f"{self.prefix}relations"
        self.released = f"{self.prefix}released"
        self.index = f"{self.prefix}rows"
        self._keys = tuple(self.prefix + name for name in _KEYS)
        self._url = url
        self._is_cluster = url.kind == "cluster"
        self._client: Redis | None = None

    async def open(self) -> None:
        """Connect; fails at the start, not at the first change.

        Raises:
            BrokerError: Redis cannot be reached or refuses.
        """
        self._client = self._make_client()
        try:
            await self.command("PING")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all connections. Idempotent; commands still under way end in an error."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(exceptions.RedisError, OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await client.aclose()

    async def script(self, name: str, *arguments: Argument, tables: Sequence[str] = (), carries: int = 0) -> Any:
        """Run one operation of `lua/`. Atomic: it has happened whole or not at all.

        Args:
            name: of the file.
            *arguments: its ARGV, after the name for a new epoch, which all take.
            tables: those whose fields of the row index it is about.
            carries: bytes of the arguments, or of the answer; a big one is given more time.

        Raises:
            BrokerError: it is not known whether it has happened.
        """
        text, digest = _script(name, "SPUBLISH" if self._is_cluster else "PUBLISH")
        keys = (*self._keys, *(f"{self.index}:{table}" for table in tables))
        rest = (len(keys), *keys, secrets.token_hex(4), *arguments)
        with self.explained():
            async with asyncio.timeout(COMMAND_SECONDS + carries / _BYTES_PER_SECOND):
                try:
                    return await self._execute("EVALSHA", digest, *rest)
                except exceptions.NoScriptError:
                    return await self._execute("EVAL", text, *rest)

    async def sized_script(
        self, name: str, *arguments: Argument, most: int = _ANSWER_BYTES, tables: Sequence[str] = ()
    ) -> Any:
        """Run an operation whose answer may be of any size: in place of one that is too large it tells the size.

        Then it is run again, with the time that so large an answer takes.

        Args:
            name: of the file.
            *arguments: its ARGV, after the bytes that the answer may have.
            most: those bytes, at first.
            tables: as in `script`.

        Raises:
            BrokerError: Redis cannot be reached or refuses.
        """
        while isinstance(answer := await self.script(name, most, *arguments, tables=tables, carries=most), int):
            most = answer
        return answer

    async def command(self, *arguments: Argument, seconds: float = COMMAND_SECONDS) -> Any:
        """Run a plain command on one key, or on none.

        Raises:
            BrokerError: it is not known whether it has happened.
        """
        with self.explained():
            async with asyncio.timeout(seconds):
                return await self._execute(*arguments)

    async def _execute(self, *arguments: Argument) -> Any:
        client = self._opened
        try:
            return await client.execute_command(*arguments)  # type: ignore[no-untyped-call]
        except exceptions.ResponseError as error:
            if explain(error) not in _NOT_HERE:
                raise
            await client.connection_pool.disconnect(inuse_connections=False)
        return await client.execute_command(*arguments)  # type: ignore[no-untyped-call]

    async def keys(self) -> AsyncIterator[bytes]:
        """All keys of the namespace, some perhaps twice."""
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", self.prefix) + "*"
        with self.explained():
            async for key in self._opened.scan_iter(match=pattern, count=1000):
                yield key

    @asynccontextmanager
    async def subscribed(self) -> AsyncIterator["Subscription"]:
        """Receive what is published to the history's channel, on a connection of its own.

        Raises:
            BrokerError: Redis cannot be reached or refuses.
        """
        pubsub = self._opened.pubsub()
        try:
            with self.explained():
                async with asyncio.timeout(COMMAND_SECONDS):
                    if self._is_cluster:  # which would carry an ordinary publication to all of its nodes
                        await pubsub.ssubscribe(self.name)
                    else:
                        await pubsub.subscribe(self.name)
                    while not await pubsub.get_message(timeout=COMMAND_SECONDS):
                        pass
            yield Subscription(pubsub, self)
        finally:
            with suppress(exceptions.RedisError, OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await pubsub.aclose()  # type: ignore[no-untyped-call]

    @property
    def _opened(self) -> Redis:
        if self._client is None:
            raise BrokerError(f"Redis at {self._url}: the broker is closed")
        return self._client

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn what redis-py raises into `BrokerError`."""
        try:
            yield
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise BrokerError(f"Redis at {self._url} {explain(error)}") from error

    def _make_client(self) -> Redis:
        url, options = self._url, _options(self._url)
        if url.kind == "unix":
            return Redis(unix_socket_path=url.path, db=url.database, **options)
        if url.kind == "single":
            host, port = url.hosts[0]
            return Redis(host=host, port=port, db=url.database, **options)
        tls = options.pop("ssl", False)
        finder: Finder
        if url.kind == "sentinel":
            own = {"username": url.sentinel_username, "password": url.sentinel_password}
            finder = SentinelFinder(url.hosts, url.service, tls=tls, options=options | own)
        else:
            finder = ClusterFinder(url.hosts, key_slot(self.name.encode()), tls=tls, options=options)
        connection_class = PrimaryTlsConnection if tls else PrimaryConnection
        pool = ConnectionPool(connection_class=connection_class, finder=finder, db=url.database, **options)
        return Redis.from_pool(pool)


class Subscription:
    """A subscribed connection.

    redis-py connects and subscribes again by itself when the connection breaks; that is told here as the error it is.
    It cannot tell a frozen connection from a quiet one: whoever hears nothing has to `ping`.
    """

    def __init__(self, pubsub: PubSub, link: Link) -> None:
        self._pubsub = pubsub
        self._link = link

    async def next(self, timeout: float) -> bytes | None:
        """The next notification; empty for an answer to `ping`, None for silence over `timeout` seconds.

        Raises:
            BrokerError: the connection broke.
        """
        with self._link.explained():
            message = await self._pubsub.get_message(timeout=timeout)
        if message is None:
            return None
        if message["type"] == "pong":
            return b""
        if message["type"] not in ("message", "smessage"):  # subscribed again, or no more: the slot has moved
            raise BrokerError("Redis: the notification connection broke")
        return bytes(message["data"])

    async def ping(self) -> None:
        """Ask for a sign of life.

        Raises:
            BrokerError: the connection broke.
        """
        with self._link.explained():
            async with asyncio.timeout(COMMAND_SECONDS):
                await self._pubsub.ping()
