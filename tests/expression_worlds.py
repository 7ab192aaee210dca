"""What Postgres says of `tests.expressions`, and whether the compiler says the same."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final

import asyncpg
import psycopg
from psycopg import sql

from realtime_bridge.change import ABSENT, Absent, Column, Image, Relation, Value
from realtime_bridge.claims import Claims
from realtime_bridge.database import PINNED
from realtime_bridge.policy.atoms import Truth, Values
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.compiler import ColumnType, compile_expression
from realtime_bridge.policy.expression import Asked, Claim, Fact, Is, Query, queries_of
from realtime_bridge.policy.facts import read_facts
from realtime_bridge.policy.index import AudienceIndex, Question
from realtime_bridge.policy.predicate import Predicate, all_of, any_of
from realtime_bridge.policy.reading import parse_expression
from tests.expressions import DATA, SCHEMA, TABLE, USERS


@dataclass(repr=False)
class World:
    """A database with `things`, and what it says of them. What was asked once is remembered.

    Attributes:
        images: the rows as changes bring them.
    """

    connection: psycopg.Connection[Any]
    columns: Mapping[str, ColumnType]
    images: Sequence[Image] = ()
    _facts: dict[tuple[str, str], object] = field(default_factory=dict)
    _answers: dict[tuple[str, str, tuple[Value, ...]], Truth | Absent] = field(default_factory=dict)
    _types: dict[str, str | None] = field(default_factory=dict)
    _written: dict[str, str] = field(default_factory=dict)
    _truths: dict[tuple[str, str], list[Truth]] = field(default_factory=dict)

    @cached_property
    def relation(self) -> Relation:
        columns = tuple(Column(name, type_.name) for name, type_ in self.columns.items())
        return Relation("public", "things", columns, (0,), full=True)

    def insert(self, rows: Iterable[Mapping[str, object]], *, seed: int, partial: int = 0) -> None:
        """Replace the rows; of the last ones, as many as `partial`, changes do not bring every column."""
        self.connection.execute("truncate public.things")
        for row in rows:
            names = sql.SQL(", ").join(map(sql.Identifier, row))
            values = sql.SQL(", ").join(map(sql.Literal, row.values()))
            self.connection.execute(sql.SQL("insert into public.things ({}) values ({})").format(names, values))
        texts = ", ".join(_text_of(name) for name in self.columns)
        whole = self._rows(f"select {texts} from public.things order by id")
        chance = random.Random(seed)
        some = [tuple(ABSENT if chance.random() < 0.3 else value for value in image) for image in whole]
        self.images = whole[: len(whole) - partial] + some[len(whole) - partial :]

    def written(self, text: str) -> str:
        """An expression as pg_get_expr writes it."""
        if text not in self._written:
            with self._undone():
                self.connection.execute(f"create policy written on {TABLE} using ({text})".encode())
                self.connection.execute("set local search_path to pg_catalog, pg_temp")
                query = "select pg_get_expr(polqual, polrelid) from pg_policy where polname = 'written'"
                ((self._written[text],),) = self._rows(query)
        return self._written[text]

    def truths(self, text: str, claims: Claims) -> list[Truth]:
        """What it comes to for every row."""
        key = text, claims.encoded
        if key not in self._truths:
            with self._as(claims):
                rows = self._rows(f"select ({text}) from public.things order by id")
                self._truths[key] = [truth for (truth,) in rows]
        return self._truths[key]

    def type_of(self, query: Query) -> str | None:
        """The type of a query, or of its elements; None if its texts do not tell what is equal."""
        if query.sql not in self._types:
            with self._undone():
                value = f"unnest({query.sql})" if query.many else f"({query.sql})"
                self.connection.execute(f"create temp view query as select {value} as value".encode())
                ((self._types[query.sql],),) = self._rows(_TYPE)
        return self._types[query.sql]

    def fact(self, fact: Fact, claims: Claims) -> object:
        """The value of a fact for a user, as `Member.facts` has it."""
        if isinstance(fact, Claim):
            return read_facts([fact], claims.values)[fact.sql]
        key = fact.sql, claims.encoded
        if key not in self._facts:
            try:
                with self._as(claims):
                    self._facts[key] = self._many(fact.sql) if fact.many else self._one(fact.sql)
            except psycopg.Error:
                self._facts[key] = ABSENT
        return self._facts[key]

    def _one(self, text: str) -> object:
        return self._rows(f"select {_text_of('value')} from (select ({text}) as value) as q")[0][0]

    def _many(self, text: str) -> object:
        if self._rows(f"select ({text}) is null")[0][0]:
            return None
        texts = [found for (found,) in self._rows(f"select {_text_of('value')} from unnest({text}) as q(value)")]
        return Values(frozenset(text for text in texts if text is not None), None in texts)

    def answer(self, questions: Iterable[Question], claims: Claims) -> list[tuple[Question, Truth | Absent]]:
        """What Postgres says of images."""
        keyed = {question: self._key(question, claims) for question in questions}
        missing: dict[Asked, list[Question]] = {}
        for question, key in keyed.items():
            if key not in self._answers:
                missing.setdefault(question.asked, []).append(question)
        for asked, some in missing.items():
            self._answers.update(
                zip((keyed[question] for question in some), self._ask(asked, some, claims), strict=True)
            )
        return [(question, self._answers[key]) for question, key in keyed.items()]

    def _key(self, question: Question, claims: Claims) -> tuple[str, str, tuple[Value, ...]]:
        return question.asked.name, claims.encoded if question.member else "", question.values

    def _ask(self, asked: Asked, questions: Sequence[Question], claims: Claims) -> list[Truth | Absent]:
        rows = ", ".join(
            f"({', '.join([str(i), *map(self._typed, asked.columns, question.values)])})"
            for i, question in enumerate(questions)
        )
        names = ", ".join(["place_of_question", *asked.columns])
        try:
            with self._as(claims):
                text = f"select ({asked.sql}) from (values {rows}) as things({names}) order by place_of_question"
                return [truth for (truth,) in self._rows(text)]
        except psycopg.Error:
            return [ABSENT] * len(questions)

    def _typed(self, name: str, value: Value) -> str:
        """A value of a column."""
        type_ = self.columns[name]
        collation = "" if type_.exact else " collate public.folded"
        return f"{sql.Literal(value).as_string()}::{type_.schema}.{type_.name}{collation}"

    def _rows(self, text: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(text.encode()).fetchall()

    @contextmanager
    def _undone(self) -> Iterator[None]:
        with self.connection.transaction(force_rollback=True):
            yield

    @contextmanager
    def _as(self, claims: Claims) -> Iterator[None]:
        with self._undone():
            settings = "select set_config('request.jwt.claims', %s, true), set_config('role', %s, true)"
            self.connection.execute(settings, [claims.encoded, claims.role])
            yield


_TYPE: Final = """
select case when coalesce(c.collisdeterministic, true)
            then case n.nspname when 'pg_catalog' then '' else n.nspname || '.' end || t.typname end
from pg_attribute a
join pg_type t on t.oid = a.atttypid
join pg_namespace n on n.oid = t.typnamespace
left join pg_collation c on c.oid = a.attcollation
where a.attrelid = 'query'::regclass
"""


def _text_of(expression: str) -> str:
    """The text that Postgres' output function writes, as a source has it; a row of NULLs is not NULL."""
    return f"case when {expression} is not distinct from null then null else format('%s', {expression}) end"


def claims_of(values: Mapping[str, Any]) -> Claims:
    return Claims(values, values["role"], values.get("sub"), None)


@contextmanager
def making_world(dsn: str) -> Iterator[World]:
    """Make the tables in a database that has the sample schema."""
    options = " ".join(f"-c {name}={value}" for name, value in PINNED.items())
    with psycopg.connect(dsn, autocommit=True, options=options) as connection:
        connection.execute(SCHEMA.encode())
        connection.execute(DATA.encode())
        catalog = Catalog(partial(_connecting, dsn))
        tables = asyncio.run(catalog.read([TABLE], ["authenticated"]))
        yield World(connection, tables[TABLE].columns)


@asynccontextmanager
async def _connecting(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


# -- what the compiler makes of them -----------------------------------------------------------------------------------


def is_decided_rightly(world: World, text: str) -> bool:
    """Whether an expression has the truth values that Postgres gives it, for all users and rows."""
    predicates = {truth: _compiled(world, text, truth) for truth in (True, False, None)}
    for claims in map(claims_of, USERS):
        verdicts = {truth: _verdicts(world, predicate, claims) for truth, predicate in predicates.items()}
        truths = world.truths(text, claims)
        for i, image in enumerate(world.images):
            expected = {truth: truth is truths[i] for truth in predicates}
            if not _agree(image, {truth: verdicts[truth][i] for truth in predicates}, expected):
                return False
    return True


def are_combined_rightly(world: World, permissive: Sequence[str], restrictive: str) -> bool:
    """Whether permissive policies and a restrictive one show together what Postgres shows by them."""
    some = any_of(_compiled(world, text, True) for text in permissive)
    predicate = all_of([some, _compiled(world, restrictive, True)])
    for claims in map(claims_of, USERS):
        verdicts = _verdicts(world, predicate, claims)
        one_of, all_ = [world.truths(text, claims) for text in permissive], world.truths(restrictive, claims)
        for i, image in enumerate(world.images):
            expected = any(truths[i] for truths in one_of) and all_[i] is True
            if not _agree(image, {True: verdicts[i]}, {True: expected}):
                return False
    return True


def _compiled(world: World, text: str, truth: Truth) -> Predicate:
    """What decides whether an expression has this truth value."""
    expression = parse_expression(world.written(text), table=TABLE, asking=True)
    types = {query.sql: world.type_of(query) for query in queries_of(expression)}
    return compile_expression(Is(expression, truth), world.columns, types)


def _agree(image: Image, found: Mapping[Truth, bool | None], expected: Mapping[Truth, bool]) -> bool:
    """Whether verdicts are those expected; where something was not brought, they may be unknown."""
    return all(found[truth] is expected[truth] or (found[truth] is None and ABSENT in image) for truth in found)


def _verdicts(world: World, predicate: Predicate, claims: Claims) -> list[bool | None]:
    """Whether the predicate holds for each row; the index and the predicate must agree."""
    index = AudienceIndex({claims.role: predicate}, {name: type_.name for name, type_ in world.columns.items()})
    member = Member((claims.role, claims.encoded), claims)
    member.facts = {fact.sql: world.fact(fact, claims) for fact in predicate.facts}
    index.add(member)
    if not index.admits(member):
        return [None] * len(world.images)
    for image in world.images:
        index.seen(world.relation, image)
    for question, truth in world.answer(index.open_questions(), claims):
        index.answer(question, truth)
    found = []
    for image in world.images:
        seen = index.seen(world.relation, image)
        verdict = index.eyes_of(member, world.relation)(image)
        assert (member in seen.sure) == (verdict is True)
        assert (member in seen.perhaps - seen.sure) == (verdict is None)
        found.append(verdict)
    assert not index.open_questions(), "all that is missing is asked for at once"
    return found
