"""Decides who may see a change, from the tables' own policies or from rules.

Policies and rules are compiled once (`policy.decision`), what must be known of users is learned when they come and put
in doubt by the changes it rests on (`policy.knowledge`), and members are sorted so that an audience costs what it is
long (`policy.index`). What neither can be compiled nor asked shows nothing to the roles it concerns, and a log line
says why.

Layer: adapters. May import: words, policy.*.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from itertools import groupby
from typing import Final, TypeVar

from realtime_bridge.change import Change, Entry, Relation, transaction_of
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BridgeError, ConfigurationError
from realtime_bridge.policy.base import Audience, Member, Reloaded, Verdict
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.decision import Decision
from realtime_bridge.policy.described import DescribedTables
from realtime_bridge.policy.expression import Expression, UnsupportedExpression
from realtime_bridge.policy.facts import identity
from realtime_bridge.policy.index import Answered, AudienceIndex, Question, Seen, lent
from realtime_bridge.policy.knowledge import Asking, Knowledge
from realtime_bridge.policy.members import Members
from realtime_bridge.policy.reading import parse_expression
from realtime_bridge.policy.shadow import Shadow
from realtime_bridge.policy.table import Table

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_ROUNDS: Final = 2
"""Answers can leave new questions open, but not for ever."""
_NOBODY: Final = Audience(frozenset(), frozenset())
_NOTHING: Final = Verdict(old=False, new=False)
_UNKNOWN: Final = Verdict(old=None, new=None)


class PolicyEngine:
    """Policy by row-level security, or by rules in its place.

    `prepare` it before its first use. An instance belongs to one event loop.

    Args:
        tables: `schema.table` each.
        roles: the roles that may connect; one that no policy binds sees everything if it is named here.
        rules: table → SQL expression, used instead of the table's policies; a role's grants count nevertheless.
        catalog: the database's own description; without one every table needs a rule, column types are those that
            changes have, and no grants are asked for.
        asking: asks Postgres what cannot be decided here; without it, that is refused.
        publication: the one whose changes come through the history; None if nothing can be relied on to come.
        fact_seconds: for how long what nobody can follow is believed.

    Attributes:
        undecided: changes of which something could not be decided for somebody.
        knowledge: what was asked of Postgres, with its counters.
        shadow: compares a sample of what was decided with Postgres; None where that cannot be asked. Run it.

    Raises:
        ConfigurationError: a table has neither policies nor a rule, or a rule cannot be decided here.
    """

    def __init__(
        self,
        tables: Sequence[str],
        roles: Sequence[str],
        rules: Mapping[str, str],
        catalog: Catalog | None = None,
        asking: Asking | None = None,
        *,
        publication: str | None = None,
        fact_seconds: float = 5.0,
    ) -> None:
        self.undecided = 0
        self._roles = frozenset(roles)
        self._rules = dict(rules)
        parsed = {table: _parse_rule(table, rule, tables, asking is not None) for table, rule in rules.items()}
        if catalog is None and (left := [name for name in tables if name not in parsed]):
            raise ConfigurationError(
                f"BRIDGE_POLICIES has no rule for {left[0]}, and there is no DATABASE_URL to read policies from."
            )
        self._tables = {name: Table(name, None if catalog else parsed[name]) for name in tables}
        self._members = Members()
        self.knowledge = Knowledge(self._tables, self._members, asking, fact_seconds)
        self.shadow = None if catalog is None or asking is None else Shadow(asking, self._roles, self._rules)
        self._reading = asyncio.Lock()
        self._described: DescribedTables | None = None
        if catalog is not None:
            self._described = DescribedTables(
                catalog, self._tables, self._roles, self._rules, asking, publication, self._distrusted
            )

    @property
    def denied_tables(self) -> dict[str, str]:
        """Tables of which no role gets anything → why."""
        return {
            name: next(iter(table.refusals.values())).reason
            for name, table in self._tables.items()
            if table.refusals and self._roles <= table.refusals.keys()
        }

    @property
    def references(self) -> frozenset[str]:
        """Tables that policies refer to, whose changes have to come through the history."""
        return self.knowledge.references

    def decision(self, table: str) -> Decision | None:
        """What decides about a table's rows now; None if there is no such table, or it cannot be read."""
        return self._tables[table].decision

    @property
    def rights(self) -> Mapping[str, str]:
        """See `rights.Rights.rights`."""
        return {} if self._described is None else self._described.rights

    @property
    def present(self) -> int:
        """How many members are in use."""
        return self._members.present

    # -- rights

    async def prepare(self) -> None:
        """Read the catalog, if there is one.

        Raises:
            ConfigurationError: a rule does not compile over its table's columns.
            DatabaseError: the catalog cannot be read now.
        """
        if self._described is None:
            self.knowledge.survey()
            return
        for table, error in (await self._read(self._described)).items():
            raise _undecidable(table, error)

    async def reload(self, table: str) -> Reloaded:
        """See `Policy.reload`. All tables are read, since policies of some may go through others."""
        if self._described is None or not (table == "*" or table in self._tables or table in self.references):
            return Reloaded()
        before, followed = self._digests(), self.knowledge.followed
        doubtful = self._doubtful()
        try:
            await self._read_patiently(self._described)
        except Exception as error:  # whatever it is: policies that may have changed must not decide any more
            is_expected = isinstance(error, BridgeError)
            logger.error("policies could not be read", exc_info=not is_expected, extra={"reason": str(error)})
            self._described.doubt(table)
        altered = {name for name, digest in self._digests().items() if digest != before[name]}
        if self.knowledge.followed != followed:  # and so what is known of members holds for longer, or less long
            altered |= self.knowledge.resting_on_answers
        is_parted = bool(altered) or self._doubtful() != doubtful
        if is_parted:
            self.part()
        return Reloaded(frozenset(altered), is_parted, frozenset(self._doubtful()))

    async def outdated(self) -> bool:
        """See `Policy.outdated`. While the catalog cannot be read, what is known holds."""
        return self._described is not None and await self._described.outdated()

    async def _read_patiently(self, described: DescribedTables) -> None:
        """As `_read`, and once more if Postgres does not answer: a process that was frozen finds its time over."""
        try:
            await self._read(described)
        except BridgeError:
            await self._read(described)

    def _digests(self) -> dict[str, str | None]:
        """By table, what it was known to be last."""
        return {name: table.last_digest for name, table in self._tables.items()}

    def _doubtful(self) -> set[str]:
        return {name for name, table in self._tables.items() if table.doubtful}

    async def _read(self, described: DescribedTables) -> Mapping[str, UnsupportedExpression]:
        async with self._reading:
            refused = await described.read()
            self.knowledge.followed = described.followed
            self.knowledge.survey()
            return refused

    def _distrusted(self) -> Collection[str]:
        return () if self.shadow is None else self.shadow.distrusted

    # -- members

    def join(self, claims: Claims) -> Member:
        """See `Policy.join`."""
        key = identity(claims, self.knowledge.claims_kept)
        member = self._members.get(key) or self._members.add(key, claims)
        member.uses += 1
        member.compared = False  # whoever comes may have been served elsewhere, with another token
        if member.uses == 1 and not member.pending:
            self._sort_in(member)
        return member

    def leave(self, member: Member) -> None:
        """See `Policy.leave`."""
        member.uses -= 1
        if member.uses or member not in self._members:
            return
        self._sort_out(member)
        if member.pending and not member.sights:
            self._members.forget(member)
        else:  # what it saw is remembered, and what has put that in doubt
            self._members.rest(member)

    async def load(self, members: Sequence[Member]) -> None:
        """See `Policy.load`."""
        known = [member for member in members if member in self._members and member.pending]
        for member in await self.knowledge.learn(known):
            member.pending = False
            member.learned += 1
            if member.uses and member in self._members:  # all may have been forgotten meanwhile
                self._sort_in(member)
        for member in members:
            if member not in self._members:
                member.pending = False
                member.learned += 1

    def digest(self, member: Member, table: str) -> str:
        """See `Policy.digest`."""
        if member not in self._members or self.knowledge.is_unlearned(member, table):
            return ""  # it left before anything was learned of it, or nothing could be
        return self._tables[table].digest_for(member, self.knowledge.is_followed)

    def refusal(self, table: str, claims: Claims, columns: Set[str] = frozenset()) -> str | None:
        """See `Policy.refusal`."""
        known = self._tables.get(table)
        if known is None:
            return f"{table} is not a table of this bridge"
        if claims.role not in self._roles:
            return f"role {claims.role} is not a role of this bridge"
        if known.doubtful:
            return None  # nothing is shown now, and it may be allowed: whoever is refused would not come back
        refusal = known.refusals.get(claims.role)
        if refusal is not None:
            return refusal.reason
        readable = None if known.decision is None else known.decision.columns.get(claims.role)
        if readable is not None and (hidden := sorted(columns - set(readable))):
            return f"role {claims.role} may not read {table}.{hidden[0][:63]}"
        return None

    def relation(self, table: str) -> Relation | None:
        """See `Policy.relation`."""
        known = self._tables.get(table)
        return None if known is None or known.decision is None else known.decision.table.relation

    def _sort_in(self, member: Member) -> None:
        role = member.claims.role
        member.columns = {
            table.name: table.decision.columns[role]
            for table in self._tables.values()
            if table.decision is not None and role in table.decision.columns
        }
        for index in self._indexes():
            index.add(member)

    def _sort_out(self, member: Member) -> None:
        for index in self._indexes():
            index.discard(member)

    def _indexes(self) -> list[AudienceIndex]:
        return [index for table in self._tables.values() for index in table.indexes]

    def part(self) -> None:
        """See `Policy.part`."""
        for member in self._members:
            self._sort_out(member)
            member.pending = True
            self._members.forget(member)

    def has_expired(self, member: Member) -> bool:
        """See `Policy.has_expired`."""
        return self._members.has_expired(member)

    def expire(self, member: Member) -> bool:
        """See `Policy.expire`."""
        has_expired = self._members.take_expired(member)
        if has_expired:
            self._forget(member)
        return has_expired

    # -- verdicts

    async def audience(self, entries: Sequence[Entry]) -> list[Audience]:
        """See `Policy.audience`.

        What a transaction puts in doubt is in doubt for all that it writes: rows that it wrote before are as new.
        """
        answers: list[Audience] = []
        run: list[Entry] = []
        for _, alike in groupby(entries, transaction_of):
            transaction = list(alike)
            touching = [entry for entry in transaction if self.knowledge.is_touched_by(entry.body)]
            if not touching:
                run += transaction
                continue
            answers += map(_own, await self._decide_run(run))
            run = []
            doubtful = frozenset[Member]().union(*map(self._put_in_doubt, touching))
            first, *others = await self._decide_run(transaction)
            answers += map(_own, (first._replace(doubtful=doubtful), *others))
        return answers + await self._decide_run(run)

    def _put_in_doubt(self, entry: Entry) -> frozenset[Member]:
        """Whoever sees, or may see, something else by an entry: nothing is decided for them before it is known."""
        doubtful: set[Member] = set()
        for member, tables in self.knowledge.doubts(entry.body).items():
            self._forget(member)
            member.doubts.update(dict.fromkeys(tables, entry.number))
            if member.uses:
                doubtful.add(member)
        return frozenset(doubtful)

    def _forget(self, member: Member) -> None:
        """Nothing is known of a member any more, until it is loaded again."""
        self._sort_out(member)
        member.pending = True
        self.knowledge.forget(member)

    async def _decide_run(self, run: Sequence[Entry]) -> list[Audience]:
        changes = [entry.body if isinstance(entry.body, Change) else None for entry in run]

        def decide() -> list[Audience]:
            return [_NOBODY if change is None else self._audience(change) for change in changes]

        answers = await self._decided(changes, decide) if run else []
        self.undecided += sum(bool(answer.unknown) for answer in answers)
        if self.shadow is not None and self.shadow.draws(len(run)):
            self._draw(self.shadow, *random.choice(list(zip(changes, answers, strict=True))))
        return answers

    def _draw(self, shadow: Shadow, change: Change | None, audience: Audience) -> None:
        table = None if change is None else self._tables.get(change.relation.name)
        if change is not None and table is not None and table.decision is not None and table.index is not None:
            shadow.note(change, audience, table.decision, table.index.members)

    async def verdicts(self, entries: Sequence[Entry], member: Member) -> list[Verdict]:
        """See `Policy.verdicts`."""
        changes = [entry.body if isinstance(entry.body, Change) else None for entry in entries]
        found = await self._decided(changes, lambda: list(self._verdicts(changes, member)))
        touching = self.knowledge.references
        return [
            verdict
            if change is not None and change.relation.name not in touching
            else verdict._replace(changed=self.knowledge.changed_by(entry.body, member))
            for entry, change, verdict in zip(entries, changes, found, strict=True)
        ]

    async def _decided(self, changes: Iterable[Change | None], decide: Callable[[], list[_T]]) -> list[_T]:
        """What is decided of changes once Postgres was asked what that has left open."""
        asking = self._begin_to_ask(changes)
        found = decide()
        answered: list[Answered] = []
        for _ in range(_ROUNDS if asking else 0):
            news = await self._answer(asking)
            if not news:
                break
            answered += news
            with lent(answered):
                found = decide()
        return found

    def _begin_to_ask(self, changes: Iterable[Change | None]) -> set[Table]:
        """The tables of these changes of whose rows Postgres is asked, without the answers that hold no more by now."""
        names = {change.relation.name for change in changes if change is not None}
        asking = {table for name in names if (table := self._tables.get(name)) is not None and table.asked}
        for table in asking:
            self.knowledge.expire_answers(table)
        return asking

    async def _answer(self, tables: Iterable[Table]) -> list[Answered]:
        """Have Postgres asked what was left open; returns what it has answered."""
        questions: list[tuple[AudienceIndex, Question]] = [
            (index, question) for table in tables for index in table.indexes for question in index.open_questions()
        ]
        return await self.knowledge.answer(questions) if questions else []

    def _audience(self, change: Change) -> Audience:
        table = self._tables.get(change.relation.name)
        if table is not None and table.doubtful:  # it may be open now to whoever it was closed to
            return Audience(frozenset(), frozenset(), frozenset(self._sorted_in()))
        index, fits = self._decider(change.relation)
        if index is None:
            return _NOBODY
        if not fits:
            return Audience(frozenset(), frozenset(), index.members)
        before, after = change.images()
        old = Seen() if before is None else index.seen(change.relation, before)
        new = Seen() if after is None else index.seen(change.relation, after)
        if not (old.perhaps or new.perhaps):
            return Audience(old.sure, new.sure)
        undecided = old.perhaps - old.sure
        unknown = (undecided | new.perhaps) - new.sure
        return Audience(old.sure - unknown, new.sure, unknown, unsure=undecided & new.sure)

    def _verdicts(self, changes: Iterable[Change | None], member: Member) -> Iterator[Verdict]:
        """What a member sees of each; what is the same for all changes of a relation is found out once."""
        known: dict[str, Callable[[Change], Verdict]] = {}
        for change in changes:
            if change is None:
                yield _NOTHING
                continue
            decide = known.get(change.relation.version)
            if decide is None:
                decide = known[change.relation.version] = self._decider_for(member, change.relation)
            yield decide(change)

    def _decider_for(self, member: Member, relation: Relation) -> Callable[[Change], Verdict]:
        if self.knowledge.is_unknown(member, relation.name):
            return lambda _: _UNKNOWN
        index, fits = self._decider(relation)
        if index is None or not index.admits(member):
            return lambda _: _NOTHING
        if not fits:
            return lambda _: _UNKNOWN
        sees = index.eyes_of(member, relation)

        def decide(change: Change) -> Verdict:
            before, after = change.images()
            return Verdict(old=before is not None and sees(before), new=after is not None and sees(after))

        return decide

    def _decider(self, relation: Relation) -> tuple[AudienceIndex | None, bool]:
        table = self._tables.get(relation.name)
        if table is None:
            return None, True
        return table.decider(relation, self._roles, self._sorted_in)

    def _sorted_in(self) -> Iterator[Member]:
        """Those who are part of audiences."""
        return (member for member in self._members if member.uses and not member.pending)


def _own(audience: Audience) -> Audience:
    """The same with sets of its own, which do not change with the index."""
    return audience._replace(
        old=frozenset(audience.old), new=frozenset(audience.new), unknown=frozenset(audience.unknown)
    )


def _parse_rule(table: str, rule: str, tables: Sequence[str], is_asking: bool) -> Expression:
    if table not in tables:
        raise ConfigurationError(f"BRIDGE_POLICIES has a rule for {table}, which is not one of BRIDGE_TABLES.")
    try:
        return parse_expression(rule, table=table, asking=is_asking)
    except UnsupportedExpression as error:
        raise _undecidable(table, error) from None


def _undecidable(table: str, error: UnsupportedExpression) -> ConfigurationError:
    return ConfigurationError(f"BRIDGE_POLICIES: the rule for {table} cannot be decided: {error.part}")
