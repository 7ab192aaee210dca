"""Decides who may see a change, from the tables' own policies or from rules.

Policies and rules are compiled once (`policy.compiler`), users' facts are read once (`policy.facts`), and members are
sorted so that an audience costs what it is long (`policy.index`). What cannot be compiled shows nothing to the roles
it concerns, and a log line says why.

Layer: adapters. May import: words, policy.*.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from realtime_bridge.change import ABSENT, Change, Entry, Image, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.errors import BridgeError, ConfigurationError
from realtime_bridge.policy.base import Audience, Member, Verdict
from realtime_bridge.policy.catalog import Catalog, CatalogPolicy, CatalogTable
from realtime_bridge.policy.compiler import ColumnType, compile_expression
from realtime_bridge.policy.expression import Claim, Expression, Fact, UnsupportedExpression, facts_of
from realtime_bridge.policy.facts import PER_TOKEN, claims_read, identity, read_facts
from realtime_bridge.policy.index import AudienceIndex, Seen
from realtime_bridge.policy.predicate import EVERYTHING, Predicate, all_of, any_of
from realtime_bridge.policy.reading import parse_expression

logger = logging.getLogger(__name__)

WATCH_SECONDS: Final = 1.0
"""For how long a change of rights that nothing announces may go unnoticed."""

_MAX_RELATIONS: Final = 16
_NOBODY: Final = Audience(frozenset(), frozenset())
_NOTHING: Final = Verdict(old=False, new=False)
_UNKNOWN: Final = Verdict(old=None, new=None)


class _Refusal(NamedTuple):
    """Why a role gets nothing of a table. Clients are told the reason, never a policy's text."""

    reason: str
    policy: str = ""
    part: str = ""


class _Decider(NamedTuple):
    """What decides the images of one relation. It does not fit if it needs columns that the relation lacks."""

    audiences: AudienceIndex | None
    fits: bool = True


@dataclass(slots=True)
class _Table:
    """A table as it is decided now.

    Attributes:
        digest: of the catalog's description that `index` was made from; None if there is none that holds.
        index: the members, sorted by what the catalog says.
        deciders: by relation version; bounded, the oldest goes first.
        doubtful: `index` may be out of date, and whoever it serves is told so instead of being shown anything.
    """

    name: str
    rule: Expression | None
    digest: str | None = None
    refusals: Mapping[str, _Refusal] = field(default_factory=dict)
    index: AudienceIndex | None = None
    deciders: dict[str, _Decider] = field(default_factory=dict)
    doubtful: bool = False

    @property
    def indexes(self) -> set[AudienceIndex]:
        """Every index that members must be sorted into."""
        found = {self.index, *(decider.audiences for decider in self.deciders.values())}
        return {index for index in found if index is not None}


class PolicyEngine:
    """Policy by row-level security, or by rules in its place.

    `load` it before its first use. An instance belongs to one event loop.

    Args:
        tables: `schema.table` each.
        roles: the roles that may connect; one that no policy binds sees everything if it is named here.
        rules: table → SQL expression, used instead of the table's policies; a role's grants count nevertheless.
        catalog: the database's own description; without one every table needs a rule, column types are those that
            changes have, and no grants are asked for.

    Attributes:
        undecided: changes of which something could not be decided for somebody.

    Raises:
        ConfigurationError: a table has neither policies nor a rule, or a rule cannot be decided here.
    """

    def __init__(
        self, tables: Sequence[str], roles: Sequence[str], rules: Mapping[str, str], catalog: Catalog | None = None
    ) -> None:
        self.undecided = 0
        self._roles = frozenset(roles)
        self._catalog = catalog
        parsed = {table: _parse_rule(table, rule, tables) for table, rule in rules.items()}
        if catalog is None and (left := [name for name in tables if name not in parsed]):
            raise ConfigurationError(
                f"BRIDGE_POLICIES has no rule for {left[0]}, and there is no DATABASE_URL to read policies from."
            )
        self._tables = {name: _Table(name, parsed.get(name)) for name in tables}
        self._members: dict[tuple[str, str], Member] = {}
        self._hidden: dict[Member, frozenset[str]] = {}
        self._kept = self._per_token_claims_read()
        self._reading = asyncio.Lock()

    @property
    def denied_tables(self) -> dict[str, str]:
        """Tables of which no role gets anything → why."""
        return {
            name: next(iter(table.refusals.values())).reason
            for name, table in self._tables.items()
            if table.refusals and self._roles <= table.refusals.keys()
        }

    async def load(self) -> None:
        """Read the catalog, if there is one.

        Raises:
            ConfigurationError: a rule does not compile over its table's columns.
            DatabaseError: the catalog cannot be read now.
        """
        if self._catalog is None:
            return
        async with self._reading:
            described = await self._catalog.read(list(self._tables), sorted(self._roles))
            for table in self._tables.values():
                try:
                    self._describe(table, described.get(table.name))
                except UnsupportedExpression as error:
                    raise _undecidable_rule(table.name, error) from None

    async def reload(self, table: str) -> None:
        """See `Policy.reload`."""
        tables = [known for known in self._tables.values() if table in ("*", known.name)]
        if self._catalog is None or not tables:
            return
        async with self._reading:
            try:
                described = await self._catalog.read([known.name for known in tables], sorted(self._roles))
            except Exception:  # whatever it is: policies that may have changed must not decide any more
                logger.exception("policies could not be read")
                for known in tables:
                    self._doubt(known)
                return
            self._describe_all(tables, described)

    async def watch(self, *, seconds: float = WATCH_SECONDS) -> None:
        """Read the catalog again every so many seconds, until cancelled; without one, return.

        That finds what no change announces (with some sources nothing does), and what `reload` could not read. While
        the catalog cannot be read here, what is known holds.
        """
        tables = list(self._tables.values())
        is_readable = True
        while self._catalog is not None:
            await asyncio.sleep(seconds)
            async with self._reading:
                try:
                    described = await self._catalog.read([known.name for known in tables], sorted(self._roles))
                except BridgeError as error:
                    if is_readable:
                        logger.warning("policies cannot be watched", extra={"reason": error.detail})
                    is_readable = False
                else:
                    is_readable = True
                    self._describe_all(tables, described)

    # -- members

    def join(self, claims: Claims) -> Member:
        """See `Policy.join`."""
        key = identity(claims, self._kept)
        member = self._members.get(key)
        if member is None:
            member = self._members[key] = Member(key, claims)
            self._hidden[member] = PER_TOKEN - self._kept
            for table in self._tables.values():
                for index in table.indexes:
                    self._add(member, index)
        member.uses += 1
        return member

    def leave(self, member: Member) -> None:
        """See `Policy.leave`."""
        member.uses -= 1
        if member.uses:
            return
        del self._members[member.key], self._hidden[member]
        for table in self._tables.values():
            for index in table.indexes:
                index.discard(member)

    def refusal(self, table: str, claims: Claims) -> str | None:
        """See `Policy.refusal`."""
        known = self._tables.get(table)
        if known is None:
            return f"{table} is not a table of this bridge"
        if claims.role not in self._roles:
            return f"role {claims.role} is not a role of this bridge"
        refusal = known.refusals.get(claims.role)
        return None if refusal is None else refusal.reason

    def _add(self, member: Member, index: AudienceIndex) -> None:
        news = [fact for fact in index.facts if isinstance(fact, Claim) and fact.sql not in member.facts]
        member.facts.update(read_facts(news, member.claims.values, hidden=self._hidden[member]))
        index.add(member)

    # -- verdicts

    async def audience(self, entries: Sequence[Entry]) -> list[Audience]:
        """See `Policy.audience`."""
        return [self._audience(entry.body) if isinstance(entry.body, Change) else _NOBODY for entry in entries]

    async def verdicts(self, entries: Sequence[Entry], member: Member) -> list[Verdict]:
        """See `Policy.verdicts`."""
        return [self._verdict(entry.body, member) if isinstance(entry.body, Change) else _NOTHING for entry in entries]

    def _audience(self, change: Change) -> Audience:
        index, fits = self._decider(change.relation)
        if index is None:
            return _NOBODY
        if not fits:
            self.undecided += 1
            return Audience(frozenset(), frozenset(), index.members)
        before, after = _images(change)
        old = Seen() if before is None else index.seen(change.relation, before)
        new = Seen() if after is None else index.seen(change.relation, after)
        if not (old.perhaps or new.perhaps):
            return Audience(old.sure, new.sure)
        unknown = ((old.perhaps - old.sure) | new.perhaps) - new.sure
        self.undecided += bool(unknown)
        return Audience(old.sure - unknown, new.sure, unknown)

    def _verdict(self, change: Change, member: Member) -> Verdict:
        index, fits = self._decider(change.relation)
        if index is None or not index.admits(member):
            return _NOTHING
        if not fits:
            return _UNKNOWN
        before, after = _images(change)
        return Verdict(
            old=False if before is None else index.sees(member, change.relation, before),
            new=False if after is None else index.sees(member, change.relation, after),
        )

    def _decider(self, relation: Relation) -> _Decider:
        table = self._tables.get(relation.name)
        if table is None:
            return _Decider(None)
        decider = table.deciders.get(relation.version)
        if decider is None:
            if len(table.deciders) >= _MAX_RELATIONS:
                del table.deciders[next(iter(table.deciders))]
            decider = table.deciders[relation.version] = self._decide_relation(table, relation)
        return decider

    def _decide_relation(self, table: _Table, relation: Relation) -> _Decider:
        if table.index is not None:
            fits = not table.doubtful and table.index.fits(relation)
            if not (fits or table.doubtful):
                logger.warning("changes lack columns that policies need", extra={"table": table.name})
            return _Decider(table.index, fits)
        if self._catalog is not None or table.rule is None:
            return _Decider(None)
        types = {column.name: ColumnType(column.type) for column in relation.columns}
        try:
            predicate = compile_expression(table.rule, types)
        except UnsupportedExpression as error:
            self._refuse_all(table, _Refusal(_CANNOT_DECIDE.format(table.name), "BRIDGE_POLICIES", error.part))
            return _Decider(None)
        table.refusals = {}
        return _Decider(self._index(dict.fromkeys(self._roles, predicate), types))

    # -- what decides

    def _describe(self, table: _Table, description: CatalogTable | None) -> None:
        """Decide a table by what the catalog says now.

        Raises:
            UnsupportedExpression: its rule does not compile.
        """
        if description is None:
            self._refuse_all(table, _Refusal(f"there is no table {table.name}"))
            return
        if description.digest == table.digest:
            return
        decided = {role: _decide(role, table.rule, description) for role in sorted(self._roles)}
        table.refusals = {role: refusal for role, refusal in decided.items() if isinstance(refusal, _Refusal)}
        predicates = {role: predicate for role, predicate in decided.items() if isinstance(predicate, Predicate)}
        table.index = self._index(predicates, description.columns)
        table.deciders.clear()
        table.doubtful = False
        table.digest = description.digest
        self._kept = self._per_token_claims_read()
        _log_refusals(table.name, table.refusals)

    def _describe_all(self, tables: Iterable[_Table], described: Mapping[str, CatalogTable]) -> None:
        for table in tables:
            try:
                self._describe(table, described.get(table.name))
            except UnsupportedExpression as error:
                self._refuse_all(table, _Refusal(_CANNOT_DECIDE.format(table.name), "BRIDGE_POLICIES", error.part))

    def _index(self, predicates: Mapping[str, Predicate], columns: Mapping[str, ColumnType]) -> AudienceIndex:
        index = AudienceIndex(predicates, {name: column.name for name, column in columns.items()})
        for member in self._members.values():
            self._add(member, index)
        return index

    def _refuse_all(self, table: _Table, refusal: _Refusal) -> None:
        refusals = dict.fromkeys(sorted(self._roles), refusal)
        if refusals == table.refusals and table.index is None:
            return
        table.refusals = refusals
        table.index = table.digest = None
        table.deciders.clear()
        _log_refusals(table.name, table.refusals)

    def _doubt(self, table: _Table) -> None:
        """Show nothing of a table until it has been described again."""
        refusal = _Refusal(f"the policies of {table.name} cannot be read now")
        table.refusals = dict.fromkeys(sorted(self._roles), refusal)
        table.digest = None
        table.deciders.clear()
        table.doubtful = True

    def _per_token_claims_read(self) -> frozenset[str]:
        facts: set[Fact] = set()
        for table in self._tables.values():
            facts |= frozenset() if table.rule is None else facts_of(table.rule)
            facts |= frozenset() if table.index is None else table.index.facts
        return PER_TOKEN & claims_read(fact for fact in facts if isinstance(fact, Claim))


_CANNOT_DECIDE: Final = "the policies of {} cannot be decided by this bridge; its log says which part"


def _decide(role: str, rule: Expression | None, table: CatalogTable) -> Predicate | _Refusal:
    """What a role sees of a table.

    Raises:
        UnsupportedExpression: the rule does not compile.
    """
    if role not in table.granted:
        return _Refusal(f"role {role} may not read the whole of {table.name}")
    if rule is not None:
        predicate = compile_expression(rule, table.columns)
    elif not table.row_security:
        return _Refusal(f"{table.name} has no row-level security, and BRIDGE_POLICIES has no rule for it")
    elif role in table.exempt:
        predicate = EVERYTHING
    else:
        combined = _combine([policy for policy in table.policies if role in policy.roles], table)
        if isinstance(combined, _Refusal):
            return combined
        predicate = combined
    return predicate if predicate.conjuncts else _Refusal(f"no policy of {table.name} shows role {role} any row")


def _combine(policies: Iterable[CatalogPolicy], table: CatalogTable) -> Predicate | _Refusal:
    """One permissive policy must hold, and every restrictive one."""
    permissive: list[Predicate] = []
    restrictive: list[Predicate] = []
    name = ""
    try:
        for policy in policies:
            name = policy.name
            predicate = compile_expression(parse_expression(policy.expression or ""), table.columns)
            for fact in predicate.facts:
                if isinstance(fact, Claim) and fact.path[0] not in table.readers:
                    raise UnsupportedExpression(f"auth.{fact.path[0]}(), which is not Supabase's here")
            (permissive if policy.permissive else restrictive).append(predicate)
        name = ""
        return all_of([any_of(permissive), *restrictive])
    except UnsupportedExpression as error:
        return _Refusal(_CANNOT_DECIDE.format(table.name), name, error.part)


def _images(change: Change) -> tuple[Image | None, Image | None]:
    """The old and the new image, each completed by what the other one proves.

    A value that the new image lacks is an unchanged one; without an old image the key is unchanged.
    """
    before, after = change.old, change.new
    if change.operation == "INSERT":
        return None, after
    if change.operation == "DELETE":
        return before or (ABSENT,) * len(change.relation.columns), None
    assert after is not None, "only a DELETE has no new image"
    if before is None:
        keys = frozenset(change.relation.key)
        return tuple(value if i in keys else ABSENT for i, value in enumerate(after)), after
    if ABSENT in after:
        after = tuple(old if new is ABSENT else new for old, new in zip(before, after, strict=True))
    return before, after


def _parse_rule(table: str, rule: str, tables: Sequence[str]) -> Expression:
    if table not in tables:
        raise ConfigurationError(f"BRIDGE_POLICIES has a rule for {table}, which is not one of BRIDGE_TABLES.")
    try:
        return parse_expression(rule)
    except UnsupportedExpression as error:
        raise _undecidable_rule(table, error) from None


def _undecidable_rule(table: str, error: UnsupportedExpression) -> ConfigurationError:
    return ConfigurationError(f"BRIDGE_POLICIES: the rule for {table} cannot be decided: {error.part}")


def _log_refusals(table: str, refusals: Mapping[str, _Refusal]) -> None:
    for refusal in dict.fromkeys(refusals.values()):
        roles = [role for role, reason in refusals.items() if reason == refusal]
        details = {"table": table, "roles": roles, "policy": refusal.policy, "part": refusal.part}
        logger.warning("a table is not delivered", extra={"reason": refusal.reason, **details})
