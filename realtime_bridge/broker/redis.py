"""Broker kept in Redis (or Valkey) and shared by every process.

A Stream holds the history, pub/sub tells of news, one script an operation makes each atomic (`lua/`). An append of one
entry is one round trip: token and continuity checked, numbered, stored, trimmed, told. Needs Redis 6.2 or later.

Layer: adapters. May import: change, errors, broker.base and its redis modules.
Sources: XADD, XTRIM, EVALSHA, PUBLISH (Redis command reference).
"""

import asyncio
import random
import secrets
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence, Set
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn, Self

from realtime_bridge.broker.base import (
    MOST_SIGHTS,
    NOTE,
    SIGHT_SECONDS,
    SIGHTS_OF_A_TABLE,
    Durability,
    Head,
    IndexedTable,
    RowChange,
    Sight,
    Update,
)
from realtime_bridge.broker.redis_follower import Follower
from realtime_bridge.broker.redis_history import RedisHistory, parse_head
from realtime_bridge.broker.redis_link import Link
from realtime_bridge.broker.redis_url import parse_redis_url
from realtime_bridge.broker.trail import Mark
from realtime_bridge.change import Body, Change, Entry, Position, Relation, encode_body
from realtime_bridge.errors import BrokerError, ForkError, HistoryGoneError, LeaseLostError

NOTIFY_BYTES: Final = 256 * 1024
"""Bodies over this in one append are not published but read: Redis cuts subscribers off that owe too much."""
_WAIT_SECONDS: Final = 0.5
_RELATIONS_KEPT: Final = 1024
_GIVEN_UP_KEPT: Final = 8
_TRIES: Final = 5


@dataclass(frozen=True, slots=True)
class RedisInfo:
    """What `check` tells of a Redis.

    Attributes:
        version: of Redis, or of the Redis that a Valkey is compatible with.
        evicts: keys may be dropped when memory is short (any `maxmemory-policy` but `noeviction`).
        append_only: written to an append-only file.
        fsync: when that is safe: always, everysec or no; None if it does not tell.
        snapshots: saved from time to time; None if it does not tell.
        replicas: connected now.
    """

    version: str
    maxmemory_policy: str
    append_only: bool
    snapshots: bool | None
    replicas: int
    fsync: str | None = None

    @property
    def evicts(self) -> bool:
        return self.maxmemory_policy != "noeviction"

    @property
    def durability(self) -> Durability:
        """What it keeps of the history."""
        if self.append_only and self.fsync != "no":
            return Durability("always" if self.fsync == "always" else "every second", self.replicas, self.evicts)
        if self.append_only or self.snapshots is None:
            return Durability("unknown", self.replicas, self.evicts)
        return Durability("snapshots" if self.snapshots else "none", self.replicas, self.evicts)


class RedisBroker:
    """Broker shared by all processes through one Redis. An instance belongs to one event loop.

    Args:
        url: of one of the forms in `broker.redis_url`.
        namespace: a hash tag before every key.
        history_size: entries kept.
        history_bytes: bytes of encoded bodies kept.
        history_seconds: age of the oldest entry kept. Trimmed by appends, empty ones too.
        row_index_bytes: bound of the row index.

    Raises:
        ConfigurationError: the url is of none of the forms.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        history_size: int,
        history_bytes: int,
        history_seconds: float,
        row_index_bytes: int,
    ) -> None:
        self._link = Link(parse_redis_url(url), namespace)
        self._history = RedisHistory(self._link)
        self._limits = (history_size, history_bytes, int(history_seconds * 1000), NOTIFY_BYTES, row_index_bytes)
        self._sight_limits = (int(history_seconds), MOST_SIGHTS, int(SIGHT_SECONDS), SIGHTS_OF_A_TABLE)
        self._sent_in = ""
        self._sent: set[str] = set()
        self._given_up: deque[str] = deque(maxlen=_GIVEN_UP_KEPT)
        self._term: _Term | None = None

    async def __aenter__(self) -> Self:
        await self._link.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._link.close()

    @property
    def link(self) -> Link:
        """The way to this Redis, open as long as the broker is, for what else its processes share."""
        return self._link

    @property
    def undecodable(self) -> int:
        """Entries that this version of the bridge could not read; each was shown as a `resync` of all tables."""
        return self._history.undecodable

    # -- lease -------------------------------------------------------------------------------------------------------

    async def acquire_lease(self, *, ttl: float) -> str:
        """See `Broker.acquire_lease`. A lease that this object has given up without Redis hearing of it is free."""
        while True:
            random_part = secrets.token_hex(8)
            given_up = " ".join(self._given_up)
            try:
                status, result, *nonce = await self._link.script("acquire", random_part, int(ttl * 1000), given_up)
                if status == b"ok":
                    token, head = str(result.decode()), (await self._history.view()).head
                    self._term = _Term(token, (head.epoch, head.number, head.id), nonce[0].decode())
                    return token
            except BaseException:
                self._given_up.append(random_part)
                raise
            wait = min(max(result / 1000, 0.01), random.uniform(_WAIT_SECONDS / 2, _WAIT_SECONDS))
            # Answers as soon as somebody releases the lease, and wakes only one of those who wait.
            await self._link.command("BLPOP", self._link.released, round(wait, 3))

    async def keep_lease(self, token: str, *, ttl: float) -> NoReturn:
        """See `Broker.keep_lease`. A Redis that is away for less than `ttl` costs nothing."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ttl
        while True:
            asked_at = loop.time()
            if await self._extend(token, ttl, until=deadline):
                deadline = asked_at + ttl
            await asyncio.sleep(max(min(ttl / 3, deadline - loop.time()), 0))
            if loop.time() >= deadline:
                raise LeaseLostError("the lease could not be extended in time")

    async def _extend(self, token: str, ttl: float, *, until: float) -> bool:
        try:
            async with asyncio.timeout_at(until):
                kept = await self._link.script("keep", token, int(ttl * 1000))
        except (BrokerError, TimeoutError):
            return False
        if not kept:
            raise LeaseLostError("another process leads, or the lease has run out")
        return True

    async def release_lease(self, token: str) -> None:
        """See `Broker.release_lease`."""
        self._given_up.append(_random_part(token))
        await self._link.script("release", token)

    # -- history -----------------------------------------------------------------------------------------------------

    async def append(
        self,
        token: str,
        bodies: Sequence[Body],
        *,
        watermark: str = "",
        proven_until: float | None = None,
        rows: Sequence[RowChange] = (),
    ) -> Head:
        """See `Broker.append`.

        A call that ends in `BrokerError`, or is cancelled, may still reach Redis later; so its token is given up here,
        and the lease has to be acquired anew before the watermark tells what has happened.
        """
        assert len(bodies) <= 1000
        if _random_part(token) in self._given_up:
            raise LeaseLostError("the lease was given up when an append was cut off")
        batch = _Batch(token, bodies, watermark, "" if proven_until is None else repr(proven_until), rows)
        try:
            return await self._append(batch)
        except (LeaseLostError, ForkError):
            raise
        except BaseException:
            self._given_up.append(_random_part(token))
            raise

    async def _append(self, batch: "_Batch") -> Head:
        if not self._history.trail.epoch:
            await self._history.view()
        for _ in range(_TRIES):
            term = self._term_of(batch.token)
            known = self._sent if self._sent_in == term.mark[0] else set()
            arguments = batch.arguments(term, self._limits, known)
            answer = await self._link.script("append", *arguments, tables=batch.tables, carries=batch.size)
            status, head = parse_head(answer)
            if status == "ok":
                self._note(head, batch, term.mark)
                self._term = _Term(batch.token, (head.epoch, head.number, head.id), batch.nonce)
                return head
            if status == "lease":
                raise LeaseLostError("another process leads")
            if status == "lost":
                raise LeaseLostError("Redis has lost what was appended last")
            if status == "relations":
                self._sent = set()
            else:
                await self._settle(batch.token, term.mark, status)
        raise BrokerError("Redis: the history changes faster than it can be appended to")

    def _note(self, head: Head, batch: "_Batch", mark: Mark) -> None:
        if self._sent_in != head.epoch or len(self._sent) > _RELATIONS_KEPT:
            self._sent_in, self._sent = head.epoch, set()
        self._sent.update(batch.relations)
        trail = self._history.trail
        epoch, number, newest_id = mark
        start = head.number - len(batch.bodies) + 1
        if trail.epoch == epoch and number == start - 1:
            trail.extend(start, newest_id, batch.ids)
        elif trail.mark == mark:
            trail.forget()  # others have appended since it was made: to be learned anew

    def _term_of(self, token: str) -> "_Term":
        """What an append continues: where its term stands, whatever else this process has followed meanwhile."""
        if self._term is not None and self._term.token == token:
            return self._term
        return _Term(token, self._history.trail.mark)

    async def _settle(self, token: str, mark: Mark, status: str) -> None:
        """Find out how today's history relates to what an append would continue, in a new epoch if need be.

        Raises:
            ForkError: something of that is no longer there.
        """
        epoch, number, newest_id = mark
        view = await self._history.view()
        if view.head.epoch == epoch and status == "fork" and self._term_of(token).mark == mark:
            # What is followed does not show it: nobody can tell what was lost.
            await self._link.script("fork", epoch, -1, "")
            view = await self._history.view()
        if view.head.epoch == epoch:
            return
        common = view.lineage.common(epoch)
        if common is not None and common >= number:
            self._term = _Term(token, (view.head.epoch, number, newest_id))
            return
        # From where the source begins anew.
        self._term = _Term(token, (view.head.epoch, view.head.number, view.head.id))
        raise ForkError(common or 0)

    async def rows(self, table: str, fields: Sequence[str]) -> list[bytes | None]:
        """See `Broker.rows`."""
        if not fields:  # which HMGET refuses
            return []
        found: list[bytes | None] = await self._link.sized_script("rows", *fields, tables=[table])
        return found or [None] * len(fields)

    async def fields(self, table: str, *, most: int) -> list[str] | None:
        """See `Broker.fields`."""
        found = await self._link.sized_script("fields", most, tables=[table])
        return None if found is None else [name.decode() for name in found if name != NOTE.encode()]

    async def indexed(self) -> dict[str, IndexedTable]:
        """See `Broker.indexed`."""
        found = await self._link.command("HGETALL", self._link.index)
        names = {key: key.decode().removeprefix(f"{self._link.index}:") for key in found}
        return {names[key]: IndexedTable(*map(int, sizes.split())) for key, sizes in found.items()}

    async def watermark(self) -> str | None:
        """See `Broker.watermark`."""
        return (await self._history.view()).watermark or None

    async def head(self) -> Head:
        """See `Broker.head`."""
        return (await self._history.shared_view()).head

    async def locate(self, position: Position) -> int:
        """See `Broker.locate`."""
        view = await self._history.shared_view()
        head, number = view.head, position.number
        if position.epoch != head.epoch:
            common = view.lineage.common(position.epoch)
            if common is None:
                raise HistoryGoneError("the position is of an unknown epoch")
            number = min(number, common)
        if number > head.number:
            raise HistoryGoneError("the position is beyond the end of the history")
        if number < head.first - 1:
            raise HistoryGoneError("what follows the position is trimmed")
        return number

    async def recall(self, epoch: str, sights: Sequence[Sight]) -> list[int]:
        """See `Broker.recall`."""
        words: list[str | int] = []
        for s in sights:
            changed = "" if s.changed is None else s.changed
            words += (f"{s.user} {s.table}", s.digest, changed, s.least, s.before, s.number)
        answer: list[int] | None = await self._link.script("recall", *self._sight_limits, epoch, *words)
        if answer is None:
            raise BrokerError("Redis: the history is another than that in which users were looked at")
        return answer

    async def read(self, after: int, *, limit: int = 500, max_bytes: int = 1 << 20) -> list[Entry]:
        """See `Broker.read`."""
        return await self._history.decode(await self._history.read(after, limit=limit, max_bytes=max_bytes))

    @asynccontextmanager
    async def follow(self) -> AsyncGenerator[AsyncIterator[Update], None]:
        """See `Broker.follow`. Takes a connection of its own."""
        async with self._link.subscribed() as subscription:
            follower = Follower(self._history, subscription, await self._history.view())
            async with aclosing(follower.updates()) as updates:
                yield updates

    # -- for the command line ----------------------------------------------------------------------------------------

    async def teardown(self) -> None:
        """Delete all keys of the namespace, whoever uses them."""
        async for key in self._link.keys():
            await self._link.command("UNLINK", key)

    async def info(self) -> RedisInfo:
        """What an operator should know about this Redis."""
        info = await self._link.command("INFO")
        save = await self._configured("save")
        return RedisInfo(
            version=str(info.get("redis_version", "")),
            maxmemory_policy=str(info.get("maxmemory_policy", "")),
            append_only=bool(info.get("aof_enabled", 0)),
            snapshots=None if save is None else bool(save),
            replicas=int(info.get("connected_slaves", 0)),
            fsync=await self._configured("appendfsync"),
        )

    async def _configured(self, name: str) -> str | None:
        try:
            answer = await self._link.command("CONFIG GET", name)
        except BrokerError:  # CONFIG is often forbidden
            return None
        return str(answer[name]) if name in answer else None

    async def durability(self) -> Durability:
        """What this Redis keeps of the history."""
        return (await self.info()).durability


class _Term(NamedTuple):
    """A term of leading.

    Attributes:
        mark: the end of the history, as the one who leads knows it.
        nonce: of the newest append, which may have brought no entry; empty if that is not known.
    """

    token: str
    mark: Mark
    nonce: str = ""


class _Batch:
    """Bodies on their way into the history.

    Attributes:
        token: fencing token.
        nonce: by which Redis knows it.
        ids: of the entries that they become.
        relations: by version, those that the bodies need.
        tables: those whose rows change in the row index.
        size: bytes of the encoded bodies and of the rows.
    """

    def __init__(
        self, token: str, bodies: Sequence[Body], watermark: str, proven_until: str, rows: Sequence[RowChange]
    ) -> None:
        self.nonce = secrets.token_hex(6)
        self.bodies = [encode_body(body) for body in bodies]
        self.ids = [f"{self.nonce}.{ordinal}" for ordinal in range(len(bodies))]
        self.relations: dict[str, Relation] = {}
        for body in bodies:
            if isinstance(body, Change):
                self.relations[body.relation.version] = body.relation
        self.tables = list(dict.fromkeys(row.table for row in rows))
        self.size = sum(map(len, self.bodies)) + sum(len(row.text or b"") for row in rows)
        self._rows = rows
        self.token = token
        self._told = (watermark, proven_until)

    def arguments(self, term: _Term, limits: tuple[int, ...], known: Set[str]) -> list[str | bytes | int]:
        """As lua/append.lua takes them, with the relations that Redis does not know yet."""
        places = {table: place for place, table in enumerate(reversed(self.tables))}
        new = {version: relation.encoded for version, relation in self.relations.items() if version not in known}
        return [
            self.token,
            *term.mark,
            term.nonce,
            self.nonce,
            *self._told,
            *limits,
            len(self.relations),
            len(new),
            len(self.bodies),
            len(self._rows),
            *self.relations,
            *(word for pair in new.items() for word in pair),
            *self.bodies,
            *(word for row in self._rows for word in (places[row.table], _what(row), row.field or "", row.text or "")),
        ]


def _what(row: RowChange) -> str:
    """What lua/append.lua does for a change of the row index."""
    if row.field is None:
        return "forget all"
    if row.text is None:
        return "forget"
    return "put new" if row.only_new else "put"


def _random_part(token: str) -> str:
    return token.rpartition(".")[2]
