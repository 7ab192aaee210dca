"""Every commit with what it changed, and who may see what after it, compared with Postgres each time."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import asyncpg

from tests.oracle.world import KEYS, TRANSACTION_ROWS, USERS, Facts, Key, Row, Tables, User, facts_of

Connection = "asyncpg.Connection[asyncpg.Record]"

LEDGER: Final = """
    create schema oracle;
    create table oracle.ledger (number int primary key, xid bigint not null default txid_current());
    create function oracle.shown(users jsonb, columns jsonb) returns table (who int, tab text, shown jsonb)
    language plpgsql as $$
    declare
      one jsonb;
    begin
      for i in 0 .. jsonb_array_length(users) - 1 loop
        who := i;
        one := users -> i;
        perform set_config('request.jwt.claims', one ->> 'claims', true), set_config('role', one ->> 'role', true);
        for tab in select jsonb_array_elements_text(one -> 'tables') loop
          execute format('select coalesce(jsonb_agg(jsonb_build_array(%s)), ''[]'') from %s', columns ->> tab, tab)
            into shown;
          return next;
        end loop;
      end loop;
      perform set_config('role', 'none', true);
    end $$;
"""
"""Which transactions there were: so it can be found out whether one was committed whose answer got lost."""

_USERS: Final = json.dumps(
    [{"claims": json.dumps(user.claims), "role": user.role, "tables": user.tables} for user in USERS]
)
_KEYS: Final = json.dumps({table: ", ".join(columns) for table, columns in KEYS.items()})
_TIME: Final = """
    select to_char(pg_xact_commit_timestamp(xid::text::xid) at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US')
    from oracle.ledger where number = $1
"""


@dataclass(frozen=True)
class RowChange:
    """A row before and after: None where there was none, or is none any more."""

    table: str
    old: Row | None
    new: Row | None


@dataclass(frozen=True)
class Commit:
    """One transaction.

    Attributes:
        number: 1, 2, 3 … in the order of commits, and the index in `Truth.commits`.
        time: as messages tell it.
        changes: in the order in which they were made.
        truncated: tables that were emptied, one for each time: a reader may be told of each.
        facts: those that hold after it.
    """

    number: int
    time: str
    changes: tuple[RowChange, ...]
    truncated: tuple[str, ...]
    facts: Facts

    @property
    def at(self) -> datetime:
        return datetime.fromisoformat(self.time)

    @property
    def is_bulk(self) -> bool:
        return len(self.changes) + len(self.truncated) > TRANSACTION_ROWS

    @property
    def tables(self) -> frozenset[str]:
        return frozenset({*self.truncated, *(change.table for change in self.changes)})


class Truth:
    """What has happened.

    Attributes:
        commits: all of them; that of number 0 is how it began.
        begun: the newest number of which the commit may have been seen by somebody, though its end is not known here.
        rows: all rows after the newest commit.
    """

    def __init__(self) -> None:
        self.commits: list[Commit] = [Commit(0, "", (), (), facts_of({}, 0))]
        self.begun = 0
        self.rows: Tables = {table: {} for table in KEYS}
        self._by_time: dict[str, list[Commit]] = {}

    @property
    def newest(self) -> Commit:
        return self.commits[-1]

    def at(self, time: str) -> Sequence[Commit]:
        """The commits of a moment, as messages tell it: to the millisecond."""
        return self._by_time.get(time, ())

    def facts(self, first: int, last: int) -> list[Facts]:
        """The facts that held after the commits from a number to another one."""
        return [commit.facts for commit in self.commits[first : last + 1]]

    async def begin(self, connection: Any, rows: Tables) -> None:
        """Take in how it is before the first transaction."""
        facts = facts_of(rows["public.members"], 0)
        await self._compare(connection, rows, facts)
        self.rows, self.commits = rows, [Commit(0, "", (), (), facts)]

    async def record(
        self, connection: Any, rows: Tables, changes: Sequence[RowChange], truncated: Sequence[str], policy: int
    ) -> None:
        """Take in the transaction that was begun last, now that it is committed. To be done again where it fails."""
        time = await connection.fetchval(_TIME, self.begun)
        facts = facts_of(rows["public.members"], policy)
        await self._compare(connection, rows, facts)
        commit = Commit(self.begun, f"{time[:-3]}Z", tuple(changes), tuple(truncated), facts)
        self.rows = rows
        self.commits.append(commit)
        self._by_time.setdefault(commit.time, []).append(commit)

    async def _compare(self, connection: Any, rows: Tables, facts: Facts) -> None:
        """The facts have to tell what Postgres shows: else nothing is worth anything that is judged by them."""
        async with connection.transaction(readonly=True):
            for record in await connection.fetch("select * from oracle.shown($1, $2)", _USERS, _KEYS):
                user, table = USERS[record["who"]], record["tab"]
                found = {tuple(key) for key in json.loads(record["shown"])}
                expected = {key for key, row in rows[table].items() if facts.show(user, table, row)}
                assert found == expected, (
                    f"the oracle itself is wrong after commit {self.begun}: of {table} {user.name} is shown {found}, "
                    f"not {expected}"
                )


async def read_as(connection: Any, user: User, table: str) -> dict[Key, Row]:
    """What `SELECT` shows a user of a table."""
    async with connection.transaction(readonly=True):
        await connection.execute("select set_config('request.jwt.claims', $1, true)", json.dumps(user.claims))
        await connection.execute("select set_config('role', $1, true)", user.role)
        return await read_all(connection, table)


async def read_all(connection: Any, table: str) -> dict[Key, Row]:
    """All rows that whoever is connected sees."""
    rows = [json.loads(record[0]) for record in await connection.fetch(f"select to_jsonb(t)::text from {table} t")]
    return {tuple(row[column] for column in KEYS[table]): row for row in rows}


_CLOSE_SECONDS: Final = 2.0


async def close(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Close a connection, whatever has become of it; one that was interrupted first takes back what it asked for."""
    with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
        await connection.close(timeout=_CLOSE_SECONDS)


async def open_connection(dsn: str) -> "asyncpg.Connection[asyncpg.Record]":
    """A connection whose values read as those of messages.

    Without asking for TLS: asyncpg leaves a failed future behind where it is interrupted in that.
    """
    return await asyncpg.connect(dsn, ssl=False, server_settings={"timezone": "UTC"})
