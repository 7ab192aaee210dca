"""Random transactions, one after the other, by the only one who writes."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, Final

import asyncpg

from tests.oracle.truth import RowChange, Truth, close, open_connection, read_all
from tests.oracle.world import KEYS, POLICIES, TEAMS, TRANSACTION_ROWS, USERS, Key, Row, key_of

LOST: Final = (
    OSError,
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""What a transaction may end with through no fault of its own: the server goes away, or saw a deadlock."""
_FEWEST: Final = 10
_MOST: Final = 40
_LARGE: Final = 9000
"""Characters of a value that Postgres keeps out of line, and that an update may leave as it is."""
_ROWS: Final = ("public.posts", "public.documents", "public.reports")
_TOGGLES: Final = {"public.posts": "is_public", "public.documents": "is_open"}
_IDS: Final = [user.id for user in USERS if user.id is not None]


class Work:
    """One transaction: its statements, and what they change.

    Attributes:
        rows: all rows, as they are within it.
        policy: which of `POLICIES` holds.
    """

    def __init__(self, connection: Any, truth: Truth) -> None:
        self._connection = connection
        self.rows = {table: dict(rows) for table, rows in truth.rows.items()}
        self.policy = truth.newest.facts.policy
        self.changes: list[RowChange] = []
        self.truncated: list[str] = []

    async def insert(self, table: str, **values: Any) -> None:
        places = ", ".join(f"${i}" for i in range(1, len(values) + 1))
        sql = f"insert into {table} as t ({', '.join(values)}) values ({places}) returning to_jsonb(t)::text"
        self._became(table, None, json.loads(await self._connection.fetchval(sql, *values.values())))

    async def update(self, table: str, key: Key, **values: Any) -> None:
        settings = ", ".join(f"{column} = ${i}" for i, column in enumerate(values, start=len(key) + 1))
        sql = f"update {table} t set {settings} where {self._where(table)} returning to_jsonb(t)::text"
        new = json.loads(await self._connection.fetchval(sql, *key, *values.values()))
        self._became(table, self.rows[table].pop(key), new)

    async def delete(self, table: str, key: Key) -> None:
        await self._connection.execute(f"delete from {table} where {self._where(table)}", *key)
        self._became(table, self.rows[table].pop(key), None)

    async def truncate(self, table: str) -> None:
        await self._connection.execute(f"truncate {table}")
        self.rows[table].clear()
        self.truncated.append(table)

    async def alter_policy(self, policy: int) -> None:
        await self._connection.execute(f"alter policy team on documents using ({POLICIES[policy]})")
        self.policy = policy

    def _became(self, table: str, old: Row | None, new: Row | None) -> None:
        self.changes.append(RowChange(table, old, new))
        if new is not None:
            self.rows[table][key_of(table, new)] = new

    def _where(self, table: str) -> str:
        return " and ".join(f"{column} = ${i}" for i, column in enumerate(KEYS[table], start=1))


class Writer:
    """Writes one transaction after the other, whatever happens to its connection.

    Attributes:
        turn: held for every transaction; whoever takes it has the database to itself.
    """

    def __init__(self, dsn: str, truth: Truth, seed: int) -> None:
        self.turn = asyncio.Lock()
        self._dsn = dsn
        self._truth = truth
        self._random = random.Random(seed)
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None
        self._numbers = 0
        self._kinds: list[tuple[int, Callable[[Work], Awaitable[None]]]] = [
            (60, self._insert),
            (50, self._edit),
            (40, self._toggle),
            (30, self._move),
            (10, self._change_key),
            (25, self._delete),
            (6, self._enlarge),
            (14, self._join_or_leave),
            (3, self._change_policy),
            (2, self._grow),
            (2, self._truncate),
        ]

    async def begin(self) -> None:
        """Fill the tables, before anybody looks."""
        connection = await self._connected()
        work = Work(connection, self._truth)
        for user in _IDS:
            for team in self._random.sample(TEAMS, 2):
                await work.insert("public.members", user_id=user, team=team)
        for _ in range(_FEWEST * len(_ROWS)):
            await self._insert(work)
        await self._truth.begin(connection, {table: await read_all(connection, table) for table in KEYS})

    async def run(self) -> None:
        """Write for ever."""
        while True:
            async with self.turn:
                await self._write(self._anything)
            await asyncio.sleep(self._random.choice([0, 0.02, 0.1]))  # now a rush, now a trickle

    async def mark(self) -> None:
        """Write a row that everybody sees. Only within `turn`."""
        await self._write(lambda work: work.insert("public.posts", user_id=_IDS[0], title="a mark", is_public=True))

    async def close(self) -> None:
        if self._connection is not None:
            await close(self._connection)

    # -- however the connection fares

    async def _connected(self) -> "asyncpg.Connection[asyncpg.Record]":
        if self._connection is None or self._connection.is_closed():
            self._connection = await open_connection(self._dsn)
        return self._connection

    async def _write(self, fill: Callable[[Work], Awaitable[None]]) -> None:
        while (work := await self._tried(self._commit, fill)) is None:
            pass
        while not await self._tried(self._record, work):
            pass

    async def _tried(self, step: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        """What a step returns; None if the connection got lost."""
        try:
            return await step(await self._connected(), *arguments)
        except LOST:
            if self._connection is not None:
                self._connection.terminate()
            await asyncio.sleep(0.05)
        return None

    async def _commit(self, connection: Any, fill: Callable[[Work], Awaitable[None]]) -> Work | None:
        """A transaction that is committed; None if it was rolled back, and not counted."""
        work, number = Work(connection, self._truth), len(self._truth.commits)
        transaction = connection.transaction()
        await transaction.start()
        await fill(work)
        if self._random.random() < 0.1:
            await transaction.rollback()
            return None
        await connection.execute("insert into oracle.ledger (number) values ($1)", number)
        self._truth.begun = number
        try:
            await transaction.commit()
        except LOST:
            if not await self._is_committed(number):
                self._truth.begun = number - 1
                return None
        return work

    async def _is_committed(self, number: int) -> bool:
        sql = "select exists (select from oracle.ledger where number = $1)"
        while (found := await self._tried(lambda connection: connection.fetchval(sql, number))) is None:
            pass
        return bool(found)

    async def _record(self, connection: Any, work: Work) -> bool:
        await self._truth.record(connection, work.rows, work.changes, work.truncated, work.policy)
        return True

    # -- what is written

    async def _anything(self, work: Work) -> None:
        weights, kinds = zip(*self._kinds, strict=True)
        for kind in self._random.choices(kinds, weights, k=self._random.choice([1, 1, 1, 2, 5])):
            await kind(work)

    def _text(self) -> str:
        return "".join(self._random.choices("abc äöü \"\\'{}\n\t€😀", k=self._random.randint(0, 40)))

    def _key(self, work: Work, table: str) -> Key | None:
        """That of a random row, if there are any."""
        return self._random.choice(list(work.rows[table])) if work.rows[table] else None

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _insert(self, work: Work) -> None:
        table = self._random.choice(_ROWS)
        if len(work.rows[table]) > _MOST:
            await self._delete(work)
            return
        who, team, chance = self._random.choice(_IDS), self._random.choice(TEAMS), self._random.random() < 0.3
        match table:
            case "public.posts":
                await work.insert(table, user_id=who, title=self._text(), is_public=chance)
            case "public.documents":
                values = {"team": team, "author": who, "is_open": chance, "title": self._text()}
                await work.insert(table, id=self._number(), **values, tags=[self._text(), None])
            case _:
                amount, payload = Decimal(self._random.randint(0, 10**6)) / 100, json.dumps({"text": self._text()})
                values = {"team": team, "level": self._random.randrange(5), "amount": amount, "payload": payload}
                await work.insert(table, id=f"r{self._number()}", **values)

    async def _edit(self, work: Work) -> None:
        table = self._random.choice(_ROWS)
        if (key := self._key(work, table)) is not None:
            values = {"amount": Decimal(self._number())} if table == "public.reports" else {"title": self._text()}
            await work.update(table, key, **values)

    async def _toggle(self, work: Work) -> None:
        table = self._random.choice(list(_TOGGLES))
        if (key := self._key(work, table)) is not None:
            await work.update(table, key, **{_TOGGLES[table]: not work.rows[table][key][_TOGGLES[table]]})

    async def _move(self, work: Work) -> None:
        table = self._random.choice(_ROWS)
        if (key := self._key(work, table)) is not None:
            values: dict[str, Any] = {"team": self._random.choice(TEAMS)}
            await work.update(table, key, **({"user_id": self._random.choice(_IDS)} if table == _ROWS[0] else values))

    async def _change_key(self, work: Work) -> None:
        if (key := self._key(work, "public.documents")) is not None:
            await work.update("public.documents", key, id=self._number())

    async def _delete(self, work: Work) -> None:
        table = self._random.choice(_ROWS)
        if len(work.rows[table]) > _FEWEST and (key := self._key(work, table)) is not None:
            await work.delete(table, key)

    async def _enlarge(self, work: Work) -> None:
        if (key := self._key(work, "public.posts")) is not None:
            body = "".join(self._random.choices("0123456789abcdef", k=_LARGE))
            await work.update("public.posts", key, body=body)

    async def _join_or_leave(self, work: Work) -> None:
        """Some memberships of one user, with what else there is between them."""
        who = self._random.choice(_IDS)
        for team in self._random.sample(TEAMS, self._random.choice([1, 1, 1, 2, 3])):
            if (who, team) in work.rows["public.members"]:
                await work.delete("public.members", (who, team))
            else:
                await work.insert("public.members", user_id=who, team=team)
            if self._random.random() < 0.5:
                await self._insert(work)

    async def _change_policy(self, work: Work) -> None:
        held = self._truth.newest.facts.policy
        await work.alter_policy(self._random.choice([policy for policy in range(len(POLICIES)) if policy != held]))

    async def _grow(self, work: Work) -> None:
        """More rows than are told one by one; what is too many is deleted later."""
        for _ in range(TRANSACTION_ROWS + 5):
            await self._insert(work)

    async def _truncate(self, work: Work) -> None:
        """Also what was written since the table was truncated before."""
        table = self._random.choice(_ROWS)
        await work.truncate(table)
        while self._random.random() < 0.3:
            await self._insert(work)
            await work.truncate(table)
