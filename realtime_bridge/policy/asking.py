"""Asks Postgres what only Postgres can tell: users' facts, and conditions over the images of rows.

Many users are asked about in one statement, each under their own role and claims (`policy.blocks` says how); the
transaction is read-only, as that of a GET in PostgREST is. What cannot be told of one user denies that user alone.

Layer: adapters. May import: words, database, policy.atoms, policy.base, policy.blocks, policy.catalog,
policy.expression, policy.index.
Sources: the texts are those of the types' output functions under `database.PINNED`, and so what changes bring.
"""

import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby, islice, takewhile
from typing import Final, NamedTuple, TypeAlias, TypeGuard

import asyncpg
import orjson

from realtime_bridge.change import Value
from realtime_bridge.claims import Claims
from realtime_bridge.database import CALLER_SEARCH_PATH, LOGIN_ROLE, claim_settings
from realtime_bridge.errors import DatabaseError, ForbiddenError
from realtime_bridge.policy.atoms import Failed, Truth, Values, values_of
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.blocks import (
    FAILURE,
    INPUT,
    OUTPUT,
    TRUE,
    Condition,
    Declared,
    Section,
    answers_block,
    facts_block,
    in_array,
    types_block,
)
from realtime_bridge.policy.catalog import Connect, Connection
from realtime_bridge.policy.expression import Query
from realtime_bridge.policy.index import Question

MAX_USERS: Final = 1000
MAX_QUESTIONS: Final = 5000
"""Most users, and most questions, of one statement."""

_UNREADABLE: Final = "22P05"
_FORBIDDEN: Final = "42501"
_NO_ROLE: Final = "0P000"
_NO_COLUMN: Final = "42703"
_NO_ARRAY: Final = "42804"
_CANCELED: Final = "57014"


FactValue: TypeAlias = str | Values | Failed | None
"""A value's text, NULL, or an array's elements. Of an array that is NULL that is one NULL: `= ANY` then is NULL too."""

_Row: TypeAlias = tuple[str | None, ...]


class _Item(NamedTuple):
    """One question of a user's.

    Attributes:
        number: of the query or the condition among those asked, from 0.
        place: where the caller wants the answer.
    """

    number: int
    row: _Row
    place: int


@dataclass(slots=True)
class _User:
    """Somebody who is asked about; nobody has no settings.

    Attributes:
        items: in the order of their numbers.
        answers: as the block gave them, one an item; None where it did not come to that.
    """

    role: str
    settings: tuple[str, str, str, str] | None
    items: Sequence[_Item]
    answers: list[str | None] = field(default_factory=list)

    def fail(self, state: str) -> None:
        """Answer what is not answered yet."""
        given = self.answers or [None] * len(self.items)
        self.answers = [FAILURE + state if answer is None else answer for answer in given]


class _Work(NamedTuple):
    """What users are asked.

    Attributes:
        write: makes the block for these sections.
        names: a text in which every name that the block resolves occurs.
        conditions: what items refer to; empty if they refer to queries.
    """

    write: Callable[[Sequence[Section]], str]
    names: str
    conditions: Sequence[Condition] = ()


class Asking:
    """Asks in batches, each of which is one statement.

    Args:
        connect: gives a connection for a while, within a transaction that `Database.transaction` has begun.
        roles: those that may connect: names that the login role may not use are resolved under them.
        timeout: seconds that one statement may take, and that a call may take for each of its batches.
    """

    def __init__(self, connect: Connect, roles: Iterable[str] = (), *, timeout: float = 2.0) -> None:
        self._connect = connect
        self._roles = sorted(roles)
        self._timeout = timeout

    async def types(self, queries: Collection[Query]) -> dict[str, str | None]:
        """What type each query is of, by its SQL, as `ColumnType.written` names it: of its elements if it is many.

        None if Postgres does not take it for a value, or if its collation holds different texts for equal.

        Raises:
            DatabaseError: Postgres cannot be reached, is too slow, or refuses.
        """
        asked = list(dict.fromkeys(queries))
        if not asked:
            return {}
        roles = [LOGIN_ROLE, *self._roles]
        async with self._connected() as connection:
            await self._prepare(connection, b"", [], "")
            await connection.execute(types_block(roles, [query.sql for query in asked], CALLER_SEARCH_PATH))
            found = await connection.fetch(_TYPES, OUTPUT, [query.many for query in asked])
        types = {row["number"]: row["written"] for row in found}
        return {query.sql: types.get(number) for number, query in enumerate(asked, 1)}

    async def facts(self, users: Sequence[Claims], queries: Sequence[Query]) -> list[dict[str, FactValue]]:
        """What every query is for every user, by the queries' SQL.

        Raises:
            DatabaseError: Postgres cannot be reached, or refuses altogether.
        """
        asked = [query.sql for query in queries]
        items = [_Item(number, (), number) for number in range(len(asked))]
        askers = [_user(claims, items) for claims in users]
        work = _Work(lambda sections: facts_block(sections, asked, CALLER_SEARCH_PATH), "\n".join(asked))
        await self._ask(askers, work)
        return [{q.sql: _fact(q, answer) for q, answer in zip(queries, asker.answers, strict=True)} for asker in askers]

    async def answers(
        self, columns: Mapping[str, Mapping[str, Declared]], questions: Sequence[Question]
    ) -> list[Truth | Failed]:
        """What each condition is for its row, and for its member if it has one.

        Args:
            columns: table → column → how it is declared.
            questions: about any of these tables, in any order.

        Raises:
            DatabaseError: Postgres cannot be reached, or refuses altogether.
        """
        conditions = _conditions(questions, columns)
        numbers = {name: number for number, name in enumerate(conditions)}
        found: list[Truth | Failed] = [Failed(_UNREADABLE)] * len(questions)
        items: dict[Member | None, list[_Item]] = {}
        for place, question in enumerate(questions):
            assert question.member is not None or not question.asked.of_user, "whose answer it is must be said"
            number = numbers.get(question.asked.name)
            if number is None:
                found[place] = Failed(_NO_COLUMN)
            elif _are_legible(question.values):
                items.setdefault(question.member, []).append(_Item(number, question.values, place))
        askers = [
            _user(None if member is None else member.claims, part)
            for member, own in items.items()
            for part in _parts(own)
        ]
        try:
            await self._ask(askers, _deciding(list(conditions.values())))
        except ForbiddenError:  # nobody here may use the type of a column
            if len(conditions) == 1:
                return [Failed(_FORBIDDEN)] * len(questions)
            return await self._answers_apart(columns, questions)
        for asker in askers:
            for item, answer in zip(asker.items, asker.answers, strict=True):
                found[item.place] = _truth(answer)
        return found

    async def _answers_apart(
        self, columns: Mapping[str, Mapping[str, Declared]], questions: Sequence[Question]
    ) -> list[Truth | Failed]:
        """What `answers` gives, one condition after the other."""
        found: dict[str, Iterator[Truth | Failed]] = {}
        for name in dict.fromkeys(question.asked.name for question in questions):
            own = [question for question in questions if question.asked.name == name]
            found[name] = iter(await self.answers(columns, own))
        return [next(found[question.asked.name]) for question in questions]

    async def _ask(self, users: Sequence[_User], work: _Work) -> None:
        """Have every item answered, if only by a failure.

        Whoever a statement did not come to is asked about in the next one; whoever takes all the time of one fails.
        """
        waiting = sorted((user for user in users if len(user.answers) < len(user.items)), key=_role)
        if not waiting:
            return
        batches = 1 + len(waiting) // MAX_USERS + sum(len(user.items) for user in waiting) // MAX_QUESTIONS
        ends = time.monotonic() + batches * self._timeout
        async with self._connected() as connection:
            while waiting and time.monotonic() < ends:
                batch = _batch(waiting)
                await self._ask_batch(connection, batch, work)
                reached = sum(1 for _ in takewhile(lambda user: None not in user.answers, batch))
                if not reached:
                    batch[0].fail(_CANCELED)
                waiting = waiting[max(reached, 1) :]
        for user in waiting:
            user.fail(_CANCELED)

    async def _ask_batch(self, connection: Connection, users: Sequence[_User], work: _Work) -> None:
        firsts = {item.number: item for user in reversed(users) for item in reversed(user.items)}
        nobody = _User("", None, [firsts[number] for number in sorted(firsts)])
        everyone: list[_User] = []
        ends: dict[str, int] = {}
        for role, own in groupby(users, key=_role):
            everyone += [nobody, *own]
            ends[role] = len(everyone)
        given = _input(everyone, list(ends.values()), work.conditions)
        knowing = await self._prepare(connection, given, list(ends), work.names)
        await connection.execute(work.write([Section(role, role not in knowing) for role in ends]))
        answers = iter(orjson.loads(await connection.fetchval(_ANSWERS, OUTPUT)))
        for user in everyone:
            user.answers = list(islice(answers, len(user.items)))

    async def _prepare(self, connection: Connection, given: bytes, roles: Iterable[str], names: str) -> Set[str]:
        """Set what a block goes by, and take the role to begin it in: one that may use the schemas of all these names.

        Returns:
            Those of the roles that may.
        """
        milliseconds = max(1, int(self._timeout * 1000))
        limits = (str(milliseconds), str(max(1, milliseconds // 4)))
        row = await connection.fetchrow(_PREPARE, INPUT, given.decode(), *limits, sorted({*roles, *self._roles}), names)
        assert row is not None
        return frozenset(row["knowing"])

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        try:
            async with self._connect() as connection:
                yield connection
        except asyncpg.InsufficientPrivilegeError as error:
            raise ForbiddenError("Postgres does not permit it to the login role") from error
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
            raise DatabaseError(f"Postgres could not be asked ({type(error).__name__})") from error


def _user(claims: Claims | None, items: Sequence[_Item]) -> _User:
    """Somebody of whom this is asked; without claims the login role, since the answer is the same for all."""
    if claims is None:
        return _User(LOGIN_ROLE, ("", "", "", ""), items)
    user = _User(claims.role, None, items)
    if claims.role == LOGIN_ROLE:  # which to Postgres means: back to the login role
        user.fail(_NO_ROLE)
        return user
    try:
        user.settings = claim_settings(claims)
        legible = _are_legible((claims.role, *user.settings))
    except TypeError:
        legible = False
    if not legible:
        user.fail(_UNREADABLE)
    return user


def _role(user: _User) -> str:
    return user.role


def _are_legible(values: tuple[Value, ...]) -> TypeGuard[_Row]:
    """Whether each is NULL, or a text that Postgres can be given."""
    return all(value is None or (isinstance(value, str) and _is_legible(value)) for value in values)


def _is_legible(text: str) -> bool:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return "\0" not in text


def _conditions(questions: Iterable[Question], columns: Mapping[str, Mapping[str, Declared]]) -> dict[str, Condition]:
    """What is asked, by its name, as far as all its columns are known."""
    conditions = {}
    for asked in {question.asked.name: question.asked for question in questions}.values():
        known = columns.get(asked.table, {})
        if all(column in known for column in asked.columns):
            table = asked.table.split(".", 1)[1]
            conditions[asked.name] = Condition(asked.sql, table, {column: known[column] for column in asked.columns})
    return conditions


def _deciding(conditions: Sequence[Condition]) -> _Work:
    names = "\n".join(f"{condition.sql} {condition.columns}" for condition in conditions)
    return _Work(lambda sections: answers_block(sections, conditions, CALLER_SEARCH_PATH), names, conditions)


def _parts(items: list[_Item]) -> Iterator[Sequence[_Item]]:
    """One user's items in the order of their numbers, as many at a time as one statement may hold."""
    items.sort(key=lambda item: item.number)
    for start in range(0, len(items), MAX_QUESTIONS):
        yield items[start : start + MAX_QUESTIONS]


def _batch(waiting: Sequence[_User]) -> Sequence[_User]:
    """The next users whom one statement may be about: at least one."""
    sizes = accumulate(len(user.items) for user in waiting[:MAX_USERS])
    return waiting[: max(1, sum(1 for _ in takewhile(lambda size: size <= MAX_QUESTIONS, sizes)))]


def _input(everyone: Sequence[_User], ends: Sequence[int], conditions: Sequence[Condition]) -> bytes:
    """What the blocks take in: see there."""
    settings = zip(*(user.settings or (None, "", "", "") for user in everyone), strict=True)
    given: dict[str, object] = dict(zip(("claims", "sub", "role", "email"), settings, strict=True))
    given["ends"] = ends
    if conditions:
        rows: list[dict[_Row, int]] = [{} for _ in conditions]
        items = [item for user in everyone for item in user.items]
        given["lasts"] = list(accumulate(len(user.items) for user in everyone))
        given["conditions"] = [item.number + 1 for item in items]
        given["rows"] = [rows[item.number].setdefault(item.row, len(rows[item.number]) + 1) for item in items]
        given["values"] = [
            [[in_array(row[j], declared.type) for row in own] for j, declared in enumerate(condition.columns.values())]
            for own, condition in zip(rows, conditions, strict=True)
        ]
    return orjson.dumps(given)


def _fact(query: Query, answer: str | None) -> FactValue:
    text = _text(answer)
    if not query.many or isinstance(text, Failed):
        return text
    return _NULL_ARRAY if text is None else values_of(text) or Failed(_NO_ARRAY)


def _truth(answer: str | None) -> Truth | Failed:
    text = _text(answer)
    return text if isinstance(text, Failed) or text is None else text == TRUE


def _text(answer: str | None) -> str | Failed | None:
    """What a block's answer says."""
    if answer is None:
        return Failed(_CANCELED)
    if answer.startswith(FAILURE):
        return Failed(answer[1:])
    return answer[1:] if answer else None


_NULL_ARRAY: Final = Values(frozenset(), has_null=True)

_ANSWERS: Final = "select pg_catalog.current_setting($1)"

# The read-only mode lasts until the transaction ends, as everything here does.
_PREPARE: Final = """
with schema as materialized (
  select oid from pg_namespace where position(nspname::text in $6) > 0
), role as materialized (
  select rolname::text as name from pg_roles
  where (rolname = session_user or rolname = any($5::text[]) and pg_has_role(session_user, oid, 'MEMBER'))
    and not exists (select from schema where not has_schema_privilege(pg_roles.oid, schema.oid, 'USAGE'))
)
select set_config($1, $2, true),
       set_config('statement_timeout', $3, true),
       set_config('lock_timeout', $4, true),
       set_config('transaction_read_only', 'on', true),
       set_config('check_function_bodies', 'off', true),
       set_config('standard_conforming_strings', 'on', true),
       set_config('transform_null_equals', 'off', true),
       set_config('array_nulls', 'on', true),
       set_config('jit', 'off', true),
       set_config('role', case when session_user in (select name from role) then 'none'
                               else coalesce((select min(name) from role), 'none') end, true),
       array(select name from role union all select 'none' from role where name = session_user) as knowing
"""

_TYPES: Final = """
with recursive step(number, id, coll, many) as (
  select number, (answers ->> (2 * number - 2)::int4)::oid, (answers ->> (2 * number - 1)::int4)::oid, many
  from (select current_setting($1)::json) as given(answers),
       unnest($2::bool[]) with ordinality as asked(many, number)
  union all
  select number, coalesce(e.oid, t.typbasetype), coll, many and e.oid is null
  from step
  join pg_type t on t.oid = step.id
  left join pg_type e on e.typarray = t.oid and many
  where t.typtype = 'd' or e.oid is not null
)
select step.number, case n.nspname when 'pg_catalog' then '' else n.nspname || '.' end || t.typname as written
from step
join pg_type t on t.oid = step.id
join pg_namespace n on n.oid = t.typnamespace
left join pg_collation c on c.oid = step.coll
where not many and t.typtype not in ('d', 'p') and (t.typcollation = 0 or c.collisdeterministic)
"""
