"""Tickets: what stands in an address in place of a token, where others may read it.

An address is logged by proxies and kept by browsers, so a ticket is worth little to whoever finds it: it opens one
connection, within 30 s. A WebSocket or a poll uses it up; a stream keeps it, for its EventSource comes back by itself
to the same address, and then with `Last-Event-ID`, from the same browser (`User-Agent`) and page (`Origin`). That is
not proof, since whoever can copy a request can copy its headers, but HTTP leaves an EventSource no other word to say.

A ticket carries its token, sealed; the store keeps the key of the seal, who came with the ticket, and no token. So
neither opens anything without the other, what a store keeps is small and bounded, and a redeemed token is verified like
any other: expiry, revocation, and keys and roles that are accepted no longer end a ticket too.

Layer: adapters. May import: claims, errors, broker.redis_link.
Sources: HTML Standard, "Server-sent events" (reconnection); contract.md section 4.
"""

import asyncio
import base64
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from realtime_bridge.claims import Claims
from realtime_bridge.errors import BrokerError, UnauthorizedError, UnavailableError

if TYPE_CHECKING:  # takes a while to import, and no ticket in memory needs it
    from realtime_bridge.broker.redis_link import Link

FRESH_SECONDS: Final = 30
"""For so long a ticket may wait for its first use."""
MOST_TICKETS: Final = 100_000
"""About 20 MB. A store that has more forgets those touched longest ago: their clients get a 401, and a new ticket."""
_IDLE_SECONDS: Final = 86_400
"""Redis forgets all tickets of a namespace in which none was touched for so long."""
_AT_ONCE: Final = 8
"""Questions of a process to Redis, each on a connection. Who brings a ticket has shown no credential yet: however many
do, they share these, and what the bridge itself asks of Redis never waits behind them."""
_WAIT_SECONDS: Final = 2.0
_ID_BYTES: Final = 16
_KEY_BYTES: Final = 32
_NONCE: Final = bytes(12)
"""May be constant: every key seals one token."""
_LONGEST_TICKET: Final = 32 * 1024


class TicketStore(Protocol):
    """Remembers tickets for all processes that share it. Bounded; may forget, and what it forgot is refused.

    Both methods are atomic, safe to cancel, and may raise `UnavailableError`.
    """

    async def put(self, ticket_id: str, key: str) -> None:
        """Keep the key of a ticket that has just been issued."""
        ...

    async def take(self, ticket_id: str, client: str | None, *, resuming: bool) -> str | None:
        """The key of a ticket, or None.

        The first to take it within `FRESH_SECONDS` gets it. If that one is a `client`, it gets it again whenever it is
        `resuming`; else the ticket is used up.
        """
        ...


class Tickets:
    """Issues tickets for tokens, and redeems them.

    Args:
        store: shared by all processes that may meet a ticket.
        verify: as `Verifier.verify`.
    """

    def __init__(self, store: TicketStore, verify: Callable[[str], Awaitable[Claims]]) -> None:
        self._store = store
        self._verify = verify

    async def issue(self, token: str) -> tuple[str, int]:
        """A ticket for a token that holds, and the seconds within which it has to be used first.

        Raises:
            UnauthorizedError, ForbiddenError: the token does not hold.
            UnavailableError: the token cannot be verified, or the ticket not be kept, now.
        """
        claims = await self._verify(token)
        ticket_id, key = secrets.token_bytes(_ID_BYTES), secrets.token_bytes(_KEY_BYTES)
        sealed = AESGCM(key).encrypt(_NONCE, token.encode(), ticket_id)
        await self._store.put(_text(ticket_id), _text(key))
        left = FRESH_SECONDS if claims.expires_at is None else int(claims.expires_at - time.time())
        return _text(ticket_id + sealed), max(0, min(FRESH_SECONDS, left))

    async def redeem(self, ticket: str, client: str | None = None, *, resuming: bool = False) -> Claims:
        """The claims of the token that a ticket stands for. A ticket is used even if its token no longer holds.

        Args:
            ticket: as it stands in the address.
            client: who asks for a stream, by `client_of`; None for a connection that does not come back by itself.
            resuming: whether this is a stream's reconnect: it has a `Last-Event-ID`.

        Raises:
            UnauthorizedError: the ticket or its token does not hold; the reason quotes neither.
            ForbiddenError: the token's role may not connect any more.
            UnavailableError: it cannot be told now.
        """
        ticket_id, sealed = _parts(ticket)
        key = await self._store.take(_text(ticket_id), client, resuming=resuming)
        if key is None:
            raise UnauthorizedError("the ticket is unknown, too old or used")
        try:
            token = AESGCM(_bytes(key)).decrypt(_NONCE, sealed, ticket_id)
        except InvalidTag:
            raise UnauthorizedError("the ticket is malformed") from None
        return await self._verify(token.decode())


def client_of(headers: Mapping[str, str]) -> str:
    """A digest of what a browser sends alike with every reconnect of one EventSource."""
    return hashlib.sha256(f"{headers.get('user-agent')}\n{headers.get('origin')}".encode()).hexdigest()[:32]


def _parts(ticket: str) -> tuple[bytes, bytes]:
    """Id and seal."""
    try:
        content = _bytes(ticket) if len(ticket) <= _LONGEST_TICKET else b""
    except ValueError:
        content = b""
    if len(content) <= _ID_BYTES:
        raise UnauthorizedError("the ticket is malformed")
    return content[:_ID_BYTES], content[_ID_BYTES:]


def _text(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars="-_", validate=True)


# -- stores ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Kept:
    """A ticket in memory; `client` is None until somebody has it who may come back."""

    key: str
    fresh_until: float
    client: str | None = None


class MemoryTicketStore:
    """Tickets of one process.

    Args:
        most: tickets held.
        clock: seconds that only ever grow.
    """

    def __init__(self, *, most: int = MOST_TICKETS, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def put(self, ticket_id: str, key: str) -> None:
        """See `TicketStore.put`."""
        self._kept[ticket_id] = _Kept(key, self._clock() + FRESH_SECONDS)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    async def take(self, ticket_id: str, client: str | None, *, resuming: bool) -> str | None:
        """See `TicketStore.take`."""
        kept = self._kept.get(ticket_id)
        if kept is None:
            return None
        if kept.client is None:
            if self._clock() > kept.fresh_until:
                return None
        elif not resuming or client != kept.client:
            return None
        kept.client = client
        self._kept.move_to_end(ticket_id)
        if client is None:
            del self._kept[ticket_id]
        return kept.key


class RedisTicketStore:
    """Tickets of all processes that share a Redis: a hash of tickets by id, and a sorted set of when each was touched.

    A failover may lose the newest steps: a ticket that it forgets is refused, one whose use it forgets can be used once
    more within its 30 s.

    Args:
        link: the broker's, and open as long as the broker is.
        most: tickets held.
    """

    def __init__(self, link: "Link", *, most: int = MOST_TICKETS) -> None:
        self._link = link
        self._most = most
        self._turn = asyncio.Semaphore(_AT_ONCE)

    async def put(self, ticket_id: str, key: str) -> None:
        """See `TicketStore.put`."""
        await self._run("put_ticket", ticket_id, key, FRESH_SECONDS, self._most)

    async def take(self, ticket_id: str, client: str | None, *, resuming: bool) -> str | None:
        """See `TicketStore.take`."""
        key = await self._run("take_ticket", ticket_id, client or "", int(resuming))
        return None if key is None else key.decode()

    async def _run(self, script: str, ticket_id: str, *arguments: str | int) -> bytes | None:
        try:
            async with asyncio.timeout(_WAIT_SECONDS):
                await self._turn.acquire()
        except TimeoutError:
            raise UnavailableError("too many tickets are asked about now") from None
        try:
            answer: bytes | None = await self._link.script(script, ticket_id, _IDLE_SECONDS, *arguments)
        except BrokerError as error:
            raise UnavailableError("tickets cannot be kept now") from error
        finally:
            self._turn.release()
        return answer
