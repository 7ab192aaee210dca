"""What is known of members and rows by asking Postgres, and for how long.

Facts of members are asked for when they come, all that wait at once; conditions over rows when a row is decided, all
rows and members at once. What was answered holds until a change that it rests on is met in the history, or, where
nobody can follow what it rests on, for a time.

Layer: adapters. May import: words, policy.*.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from realtime_bridge.change import ABSENT, Body, Change, Control
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BridgeError
from realtime_bridge.policy.atoms import Failed, Memo, Truth
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.blocks import Declared
from realtime_bridge.policy.decision import Surveying
from realtime_bridge.policy.doubts import (
    Reference,
    asked_by_table,
    is_concerned,
    names_of,
    references_of,
    texts_of,
    users_named,
)
from realtime_bridge.policy.expression import Asked, Claim, Query
from realtime_bridge.policy.facts import PER_TOKEN, claims_read, read_facts
from realtime_bridge.policy.index import Answered, AudienceIndex, Question
from realtime_bridge.policy.keeping import Dependencies, Keeping, References, part_of
from realtime_bridge.policy.members import Members
from realtime_bridge.policy.table import Table

logger = logging.getLogger(__name__)

NEW_SECONDS: Final = 3.0
"""A table that policies have only begun to refer to is not followed for so long: other processes, the one that reads
the source among them, may not know of it yet."""
_NO_TIME: Final = "57014"
_NO_CLAIMS_BUT: Final = frozenset({"auth.uid", "auth.role", "auth.email"})
"""What reads no claim that differs from token to token."""


class Asking(Surveying, Protocol):
    """Asks Postgres about users and rows, as `policy.asking` does. Everything may raise `DatabaseError`."""

    async def facts(self, users: Sequence[Claims], queries: Sequence[Query]) -> Sequence[Mapping[str, object]]:
        """What every query is for every user, by the queries' SQL."""
        ...

    async def answers(
        self, columns: Mapping[str, Mapping[str, Declared]], questions: Sequence[Question]
    ) -> Sequence[Truth | Failed]:
        """What each condition is for its row, and for its member if it has one."""
        ...


class Knowledge:
    """Knows what was asked, and what a change puts in doubt.

    Attributes:
        asked: questions put to Postgres about rows.
        fact_queries: queries for facts of users, each of which is about as many as came together.
        failed: facts and conditions that Postgres failed to evaluate for somebody, who sees nothing by them.
        claims_kept: claims of `PER_TOKEN` that policies may read, and so tell members apart.
        references: tables whose changes have to come through the history.
        followed: tables whose changes do.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        members: Members,
        asking: Asking | None,
        fact_seconds: float,
    ) -> None:
        self.asked = self.fact_queries = self.failed = 0
        self.claims_kept: frozenset[str] = frozenset()
        self.references: frozenset[str] = frozenset()
        self.followed: frozenset[str] = frozenset()
        self._tables = tables
        self._members = members
        self._asking = asking
        self._seconds = fact_seconds
        self._known_since: dict[str, float] = {}
        self._claims: frozenset[Claim] = frozenset()
        self._queries: Mapping[str, Sequence[Query]] = {}
        self._query_tables: frozenset[str] = frozenset()
        self._dependencies: Mapping[Query | Asked, Dependencies] = {}
        self._references: Mapping[str, Sequence[Reference]] = {}
        self._asked_by_table: Mapping[str, Sequence[tuple[Asked, Reference]]] = {}
        self._learning: dict[Member, object] = {}
        self._unlearned: set[Member] = set()
        self._answers_end: dict[str, float] = {}
        self._answers_age: dict[str, int] = defaultdict(int)
        self._is_unanswered = False

    # -- what there is to know

    def survey(self) -> None:
        """Take in what the tables' policies rest on; called whenever they have changed."""
        uses: dict[Query, set[str]] = defaultdict(set)
        asked: dict[Asked, None] = {}
        claims: set[Claim] = set()
        for table in self._tables.values():
            for fact in table.facts:
                if isinstance(fact, Claim):
                    claims.add(fact)
                else:
                    uses[fact].add(table.name)
            asked.update(dict.fromkeys(table.asked))
        wanted: list[Query | Asked] = [*uses, *asked]
        self._dependencies = {
            what: self._depends(what, decision.table.references)
            for decision in (table.decision for table in self._tables.values())
            if decision is not None
            for predicate in decision.predicates.values()
            for what in (*predicate.facts, *predicate.asked)
            if not isinstance(what, Claim)
        }
        self._claims = frozenset(claims)
        self._queries = self._queries_by_role()
        self._query_tables = frozenset().union(*uses.values())
        self._references = references_of(
            {query: (frozenset(tables), self._dependencies[query]) for query, tables in uses.items()}
        )
        self._asked_by_table = asked_by_table({one: self._dependencies[one] for one in asked})
        self.references = frozenset(self._references) | frozenset(self._asked_by_table)
        now = time.monotonic()
        self._known_since = {table: self._known_since.get(table, now) for table in self.references}
        self.claims_kept = PER_TOKEN if any(map(_may_read_any_claim, wanted)) else PER_TOKEN & claims_read(claims)

    def _depends(self, what: Query | Asked, references: References) -> Dependencies:
        if isinstance(what, Query):
            return references.dependencies(what.reads, self.followed, what.keyed_by)
        part = part_of(what.sql, what.table, references.claims)
        return references.dependencies(what.reads, self.followed, frozenset() if part is None else part.keyed_by)

    def _queries_by_role(self) -> dict[str, Sequence[Query]]:
        found: dict[str, dict[Query, None]] = defaultdict(dict)
        for table in self._tables.values():
            for role, predicate in ({} if table.decision is None else table.decision.predicates).items():
                found[role].update((fact, None) for fact in predicate.facts if isinstance(fact, Query))
        return {role: sorted(queries, key=lambda query: query.sql) for role, queries in found.items()}

    @property
    def resting_on_answers(self) -> frozenset[str]:
        """Tables of which Postgres has to be asked what members see."""
        return self._query_tables | {asked.table for asked in self._dependencies if isinstance(asked, Asked)}

    def is_followed(self, query: Query) -> bool:
        """Whether a fact changes by what the history tells, and by nothing else."""
        return self._dependencies[query].keeping is Keeping.TRACKED

    def _is_tracked(self, what: Query | Asked) -> bool:
        """Whether a change in the history tells when an answer stops to hold, or nothing can make it."""
        depends = self._dependencies[what]
        now = time.monotonic()
        return depends.keeping is Keeping.CLAIMS or (
            depends.keeping is Keeping.TRACKED
            and all(now - self._known_since[table] > NEW_SECONDS for table in depends.tables)
        )

    # -- members

    async def learn(self, members: Sequence[Member]) -> list[Member]:
        """Learn the facts of members; returns those of whom nothing has come into doubt meanwhile.

        What Postgres cannot be asked now is ABSENT, and the member `is_unlearned`.
        """
        marks = {member: object() for member in members}
        self._learning.update(marks)
        by_role: dict[str, list[Member]] = defaultdict(list)
        for member in members:
            by_role[member.claims.role].append(member)
        learned: list[Member] = []
        for role, alike in by_role.items():
            learned += await self._learn(alike, self._queries.get(role, ()), marks)
        return learned

    async def _learn(
        self, members: Sequence[Member], queries: Sequence[Query], marks: Mapping[Member, object]
    ) -> list[Member]:
        learned: list[Member] = []
        found = await self._ask(members, queries) if queries else [{} for _ in members]
        expires = not all(map(self._is_tracked, queries))
        for member, facts in zip(members, found, strict=True):
            if self._learning.get(member) is not marks[member]:
                continue
            del self._learning[member]
            answers = {name: value for name, value in member.facts.items() if isinstance(value, Memo)}
            member.facts = {**answers, **read_facts(self._claims, member.claims.values), **facts}
            self.failed += sum(isinstance(value, Failed) for value in facts.values())
            self._unlearned.discard(member)
            if any(value is ABSENT or _is_late(value) for value in facts.values()):
                self._unlearned.add(member)
                member.confirmed -= self._query_tables
                self._members.expire(member, self._seconds)  # and is asked for again
            elif expires:
                self._members.expire(member, self._seconds)
            learned.append(member)
        return learned

    async def _ask(self, members: Sequence[Member], queries: Sequence[Query]) -> Sequence[Mapping[str, object]]:
        assert self._asking is not None, "queries come from where Postgres can be asked"
        self.fact_queries += 1
        try:
            facts = await self._asking.facts([member.claims for member in members], queries)
        except BridgeError as error:
            self._complain(error)
            return [{query.sql: ABSENT for query in queries} for _ in members]
        self._is_unanswered = False
        return facts

    def _complain(self, error: BridgeError) -> None:
        """Tell once that Postgres does not answer, however many ask until it does."""
        if not self._is_unanswered:
            logger.warning("Postgres cannot be asked what users see", extra={"reason": error.detail})
        self._is_unanswered = True

    def forget(self, member: Member) -> None:
        """What is known of a member, or being learned, holds no more."""
        self._learning.pop(member, None)
        self._unlearned.discard(member)

    def is_unlearned(self, member: Member, table: str) -> bool:
        """Whether facts of a member that decide a table could not be read when it was loaded."""
        return member in self._unlearned and table in self._query_tables

    def is_unknown(self, member: Member, table: str) -> bool:
        """Whether it is not known what a member sees: policies, or facts of it that they need, cannot be read."""
        known = self._tables.get(table)
        return (known is not None and known.doubtful) or self.is_unlearned(member, table)

    # -- what a change puts in doubt

    def is_touched_by(self, body: Body) -> bool:
        """Whether `doubts` has to be asked before what follows a body is decided."""
        if isinstance(body, Control):
            return body.kind == "resync" and bool(
                self.references if body.table == "*" else {body.table} & self.references
            )
        table = body.relation.name
        return table in self.references or (
            table in self._query_tables and bool(self._unlearned or self._members.expiring)
        )

    def doubts(self, body: Body) -> dict[Member, set[str]]:
        """Whose facts hold no more by a body, or have ended by now, each with the tables where it has changed them."""
        found: dict[Member, set[str]] = defaultdict(set)
        if isinstance(body, Control):
            for table in self.references if body.table == "*" else (body.table,):
                self._doubt_all(table, found)
            return found
        self._doubt_concerned(body, found)
        if body.relation.name in self._query_tables:
            for member in (*self._members.expired(), *self._unlearned):
                found.setdefault(member, set())  # in doubt, though by no entry
        return found

    def _doubt_concerned(self, change: Change, found: dict[Member, set[str]]) -> None:
        table = change.relation.name
        for reference in self._references.get(table, ()):
            if is_concerned(reference, change):
                for member in self._concerned(reference, change):
                    found[member] |= reference.tables
        for asked, reference in self._asked_by_table.get(table, ()):
            if is_concerned(reference, change):
                self._drop_answers(asked)
                for member in self._seeing_otherwise(asked, reference, change):
                    found[member].add(asked.table)
                    member.confirmed.discard(asked.table)

    def _doubt_all(self, table: str, found: dict[Member, set[str]]) -> None:
        for reference in self._references.get(table, ()):
            for member in self._members:
                found[member] |= reference.tables
        for asked, _ in self._asked_by_table.get(table, ()):
            self._drop_answers(asked)
            for member in self._members:
                if self._is_asked_for(asked, member):
                    found[member].add(asked.table)
                    member.confirmed.discard(asked.table)

    def _seeing_otherwise(self, asked: Asked, reference: Reference, change: Change) -> Iterable[Member]:
        """Who may see other rows by a condition now."""
        named = _users_asked_for(reference, change)
        candidates = self._members if named is None else self._members.named(named)
        return (member for member in candidates if self._is_asked_for(asked, member))

    def _is_asked_for(self, asked: Asked, member: Member) -> bool:
        """Whether what a member sees depends on a condition."""
        table = self._tables[asked.table]
        if table.decision is None:  # if it is in doubt, what it was before may hold still
            return asked in table.asked
        predicate = table.decision.predicates.get(member.claims.role)
        return predicate is not None and asked in predicate.asked

    def _concerned(self, reference: Reference, change: Change) -> Iterable[Member]:
        named = users_named(change, reference.keys) if reference.keys else None
        return self._members if named is None else self._members.named(named)

    def changed_by(self, body: Body, member: Member) -> frozenset[str]:
        """Tables of which a member may see other rows from an entry on, whenever it was that its facts were read.

        Not those where only the facts themselves can tell, since a change there may concern anybody; but those, too,
        while the facts, or which they are, cannot be read.
        """
        if isinstance(body, Control):
            if body.kind == "catalog":
                return frozenset({body.table}) if body.reason else frozenset()
            return self._all_changed_by(self.references if body.table == "*" else (body.table,))
        table, names = body.relation.name, names_of(member.claims.values)
        found: set[str] = set()
        for reference in self._references.get(table, ()):
            if not is_concerned(reference, body):
                continue
            if not reference.keys:
                found |= {name for name in reference.tables if self.is_unknown(member, name)}
            elif _is_among(names, users_named(body, reference.keys)):
                found |= reference.tables
        for asked, reference in self._asked_by_table.get(table, ()):
            if self._is_asked_for(asked, member) and is_concerned(reference, body):
                found |= {asked.table} if _is_among(names, _users_asked_for(reference, body)) else set()
        return frozenset(found)

    def _all_changed_by(self, tables: Iterable[str]) -> frozenset[str]:
        known = [reference.tables for table in tables for reference in self._references.get(table, ())]
        asked = {one.table for table in tables for one, _ in self._asked_by_table.get(table, ())}
        return frozenset(asked).union(*known)

    # -- conditions over rows

    def expire_answers(self, table: Table) -> None:
        """Drop the answers about a table's rows that hold no more by now."""
        now = time.monotonic()
        for asked in table.asked:
            if self._is_tracked(asked):
                continue
            if self._dependencies[asked].keeping is Keeping.VOLATILE or now >= self._answers_end.get(asked.name, 0.0):
                self._answers_end[asked.name] = now + self._seconds
                self._drop_answers(asked)

    def _drop_answers(self, asked: Asked) -> None:
        self._answers_age[asked.name] += 1
        owners: Iterable[Mapping[str, object]] = (
            (member.facts for member in self._members)
            if asked.of_user
            else (index.shared for index in self._tables[asked.table].indexes)
        )
        for owner in owners:
            memo = owner.get(asked.name)
            if isinstance(memo, Memo):
                memo.answers.clear()

    async def answer(self, questions: Sequence[tuple[AudienceIndex, Question]]) -> list[Answered]:
        """Have Postgres answer questions; returns what it has answered.

        It is kept for as long as it holds. What has come into doubt meanwhile is not: it was true when it was asked,
        and so good enough for what is being decided, which was committed before.
        """
        assert self._asking is not None, "questions come from where Postgres can be asked"
        decisions = (table.decision for table in self._tables.values())
        columns = {decision.table.name: decision.table.declared for decision in decisions if decision is not None}
        ages = {question.asked.name: self._answers_age[question.asked.name] for _, question in questions}
        try:
            truths = await self._asking.answers(columns, [question for _, question in questions])
        except BridgeError as error:
            self._complain(error)
            return []
        self._is_unanswered = False
        self.asked += len(questions)
        self.failed += sum(isinstance(truth, Failed) for truth in truths)
        answered = [
            Answered(index, question, truth)
            for (index, question), truth in zip(questions, truths, strict=True)
            if not _is_late(truth)
        ]
        for index, question, truth in answered:
            if self._answers_age[question.asked.name] == ages[question.asked.name]:
                index.answer(question, truth)
        return answered


def _users_asked_for(reference: Reference, change: Change) -> frozenset[str] | None:
    """Those for whom a condition may be answered otherwise by a change; None for anybody.

    A new row that a condition does not find by its user cannot be told to everybody: most parents are made before
    their children, and by the thousand. Whoever it names is told.
    """
    if change.operation == "INSERT" and not reference.keys:
        return texts_of(change)
    return users_named(change, reference.keys) if reference.keys else None


def _is_among(names: frozenset[str], named: frozenset[str] | None) -> bool:
    return named is None or bool(names & named)


def _is_late(answer: object) -> bool:
    """Whether there was no time for an answer: then it is not known, which is something else than that it failed."""
    return isinstance(answer, Failed) and answer.state == _NO_TIME


def _may_read_any_claim(what: Query | Asked) -> bool:
    return any(name not in _NO_CLAIMS_BUT and not name.startswith("pg_catalog.") for name in what.reads.functions)
