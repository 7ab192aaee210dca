"""Tickets: what stands in an address in place of a token, where others may read it.

An address is logged by proxies and kept by browsers, so a ticket is worth little to whoever finds it: it opens one
connection, within 30 s, and afterwards serves only to take that connection up again. "That connection again" is what an
EventSource does by itself: the same address with `Last-Event-ID`, from the same browser (`User-Agent`) and page
(`Origin`). That is not proof, since whoever can copy a request can copy its headers, but HTTP leaves an EventSource no
other word to say; a ticket on a WebSocket is gone with its first use.

A ticket carries its token, sealed; the store keeps the key of the seal, who came with the ticket, and no token. So
neither opens anything without the other, what a store keeps is small and bounded, and a redeemed token is verified like
any other: expiry, revocation, and keys and roles that are accepted no longer end a ticket too.

Layer: adapters. May import: claims, errors, broker.redis_link, broker.redis_url.
Sources: HTML Standard, "Server-sent events" (reconnection); contract.md section 4.
"""

import base64
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.redis_url import parse_redis_url
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BrokerError, UnauthorizedError, UnavailableError

FRESH_SECONDS: Final = 30
"""For so long a ticket may wait for its first use."""
MOST_TICKETS: Final = 100_000
"""About 20 MB. A store that has more forgets those touched longest ago: their clients get a 401, and a new ticket."""
_IDLE_SECONDS: Final = 86_400
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

    async def take(self, ticket_id: str, client: str, *, resuming: bool) -> str | None:
        """The key of a ticket, or None.

        The first to take it within `FRESH_SECONDS` gets it, and after that whoever resumes as the same `client`.
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

    async def redeem(self, ticket: str, *, resuming: bool, client: str = "") -> Claims:
        """The claims of the token that a ticket stands for. A ticket is used up even if its token no longer holds.

        Args:
            ticket: as it stands in the address.
            resuming: whether this is an EventSource's reconnect: a request for events with `Last-Event-ID`.
            client: what tells browsers and pages apart, by `client_of`.

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
    """A ticket in memory; `client` is None until it is used."""

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

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._kept.clear()

    async def put(self, ticket_id: str, key: str) -> None:
        """See `TicketStore.put`."""
        self._kept[ticket_id] = _Kept(key, self._clock() + FRESH_SECONDS)
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    async def take(self, ticket_id: str, client: str, *, resuming: bool) -> str | None:
        """See `TicketStore.take`."""
        kept = self._kept.get(ticket_id)
        if kept is None:
            return None
        if kept.client is None:
            if self._clock() > kept.fresh_until:
                return None
            kept.client = client
        elif not resuming or client != kept.client:
            return None
        self._kept.move_to_end(ticket_id)
        return kept.key


_PUT: Final = """
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %s', time[1] + ARGV[3], ARGV[2]))
redis.call('ZADD', KEYS[2], time[1] * 1000000 + time[2], ARGV[1])
local over = redis.call('ZCARD', KEYS[2]) - ARGV[4]
if over > 0 then
  for i, member in ipairs(redis.call('ZPOPMIN', KEYS[2], over)) do
    if i % 2 == 1 then redis.call('HDEL', KEYS[1], member) end
  end
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[5]) end
"""
_TAKE: Final = """
local kept = redis.call('HGET', KEYS[1], ARGV[1])
if not kept then return false end
local time = redis.call('TIME')
local fresh_until, key, client = kept:match('^(%d+) (%S+) ?(.*)$')
if client == '' then
  if time[1] + 0 > fresh_until + 0 then return false end
  redis.call('HSET', KEYS[1], ARGV[1], kept .. ' =' .. ARGV[2])
elseif ARGV[3] == '0' or client ~= '=' .. ARGV[2] then
  return false
end
redis.call('ZADD', KEYS[2], time[1] * 1000000 + time[2], ARGV[1])
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[4]) end
return key
"""


class RedisTicketStore:
    """Tickets of all processes that share a Redis: a hash of tickets by id, and a sorted set of when each was touched.

    A failover may lose the newest steps: a ticket that it forgets is refused, one whose use it forgets can be used once
    more within its 30 s.

    Args:
        url: as `REDIS_URL`.
        namespace: a hash tag before both keys.
        most: tickets held.

    Raises:
        ConfigurationError: the url is of no known form.
    """

    def __init__(self, url: str, *, namespace: str, most: int = MOST_TICKETS) -> None:
        self._link = Link(parse_redis_url(url), namespace)
        self._keys = (f"{self._link.prefix}tickets", f"{self._link.prefix}tickets-touched")
        self._most = most

    async def __aenter__(self) -> Self:
        await self._link.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._link.close()

    async def put(self, ticket_id: str, key: str) -> None:
        """See `TicketStore.put`."""
        await self._run(_PUT, ticket_id, key, FRESH_SECONDS, self._most, _IDLE_SECONDS)

    async def take(self, ticket_id: str, client: str, *, resuming: bool) -> str | None:
        """See `TicketStore.take`."""
        key = await self._run(_TAKE, ticket_id, client, int(resuming), _IDLE_SECONDS)
        return None if key is None else key.decode()

    async def _run(self, script: str, *arguments: str | int) -> bytes | None:
        try:
            answer: bytes | None = await self._link.command("EVAL", script, len(self._keys), *self._keys, *arguments)
        except BrokerError as error:
            raise UnavailableError("tickets cannot be kept now") from error
        return answer
