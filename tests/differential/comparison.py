"""The comparison: for every change and user, what the engine decides against what Postgres shows."""

import reprlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from realtime_bridge.change import Change
from realtime_bridge.claims import Claims
from tests.differential.engine import Decided, Engine
from tests.differential.ground import ground
from tests.differential.truth import Truth, look

REFUSED: Final = "public.refused_"
"""Tables whose policies nobody but Postgres can decide on an image: they show nothing, and say so."""

RAISED_BY_ROWS: Final = frozenset({"public.divided", "public.divided_first", "public.cast_column"})
"""Tables whose policies raise on account of some of their rows; all others, on account of the user."""

NEVER_RAISED: Final = frozenset(
    f"public.{table}"
    for table in ["cast_column", "endless", "exists_none", "forbidden", "not_any", "not_in_set", "opaque_negated"]
)
"""Tables of which no row may be shown on which Postgres raises. Of all others one part of a policy may be TRUE where
another raises: Postgres promises no order of evaluation, so it might as well have shown the row."""

Kind = Literal["leak", "raised", "miss"]
"""Shown although Postgres does not show it, or although it raises; or not shown although it does."""
Side = Literal["old", "new"]
Way = Literal["audience", "verdicts"]
WAYS: Final[tuple[Way, Way]] = ("audience", "verdicts")


@dataclass(frozen=True)
class Mismatch:
    """One image and one user on whom the engine and Postgres differ."""

    kind: Kind
    way: Way
    side: Side
    change: Change
    user: Claims

    def __str__(self) -> str:
        image = self.change.old if self.side == "old" else self.change.new
        row = {name: reprlib.repr(image[i]) for name, i in self.change.relation.index.items()} if image else None
        where = f"{self.change.relation.name}, {self.side} row of an {self.change.operation} ({self.way})"
        return f"{self.kind}: {where}\n    row    {row}\n    claims {self.user.encoded}"


@dataclass
class Tally:
    """What was compared, and what came out.

    Attributes:
        missing: what this server lacks of the schema's optional parts.
        pairs: images × users.
        shown: of these, how many Postgres shows.
        refused: pairs that Postgres shows, of a table and role that the engine refuses altogether, by table.
        asked: conditions on a row that Postgres was asked: of a pair perhaps several, or one for several pairs.
        raised: pairs shown although Postgres raises, where it might as well not.
        excused: pairs not shown to a user whose `SELECT` of the whole table raises.
        undecidable: pairs whose old row the source did not bring.
        misread: pairs not shown to a user with a claim whose text only Postgres knows.
        unknown: changes × users of which an image is not known, and the user is told to read the table again.
    """

    missing: Sequence[str] = ()
    pairs: int = 0
    shown: int = 0
    asked: int = 0
    raised: int = 0
    excused: int = 0
    undecidable: int = 0
    misread: int = 0
    unknown: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    mismatches: list[Mismatch] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            *[f"without {part}, which this server does not have" for part in self.missing],
            f"{self.pairs:,} pairs, {self.shown:,} of them shown by Postgres; {len(self.mismatches):,} mismatches; "
            f"Postgres was asked {self.asked:,} conditions, the rest was decided in memory",
            f"not shown although Postgres does: {self.refused.total():,} of {len(self.refused)} tables that are "
            f"refused, {self.excused:,} where the whole SELECT raises, {self.misread:,} for want of a claim, "
            f"{self.undecidable:,} old rows that were not brought; {self.unknown:,} answered by a resync; "
            f"{self.raised:,} shown although Postgres raises on that row",
        ]
        found = Counter((m.kind, m.change.relation.name, m.side, m.way) for m in self.mismatches)
        lines += [f"{count} times {' '.join(what)}" for what, count in found.items()]
        smallest = {(m.kind, m.change.relation.name): m for m in reversed(self.mismatches)}
        return "\n".join([*lines, *map(str, smallest.values())])


async def compare_all(dsn: str, slot: str, seed: int) -> Tally:
    """Compare rows that come, then rows that change and go, in an empty database of its own.

    Args:
        dsn: the database, as its superuser.
        slot: a name that no other test has.
        seed: the same again gives the same again.
    """
    async with ground(dsn, slot, seed) as there:
        users = there.world.users
        async with Engine.open(dsn, there.names, users) as engine:
            comparison = Comparison(engine, users, Tally(there.missing))
            inserted = await there.insert()
            before = await look(there.connection, users, there.names)
            await comparison.compare(inserted, Truth(), before)
            changed = await there.change()
            now = await look(there.connection, users, there.names)
            await comparison.compare(changed, before, now)
            comparison.tally.asked = engine.asked
            return comparison.tally


@dataclass
class Comparison:
    """Compares what an engine decides now with what Postgres showed, and counts."""

    engine: Engine
    users: Sequence[Claims]
    tally: Tally = field(default_factory=Tally)

    async def compare(self, changes: Sequence[Change], before: Truth, now: Truth) -> None:
        """Compare both images of each change, and both ways in which the engine is asked.

        Args:
            changes: what was done.
            before: what Postgres showed before that: the truth of old rows.
            now: what it shows with it: the truth of new rows.
        """
        audiences, verdicts = await self.engine.audiences(changes), await self.engine.verdicts(changes)
        self.tally.unknown += sum(len(decided.unknown) for decided in audiences)
        for change, *both in zip(changes, audiences, verdicts, strict=True):
            ways: dict[Way, Decided] = dict(zip(WAYS, both, strict=True))
            if change.operation != "INSERT":
                self._compare_image(change, "old", before, {way: ways[way].old for way in WAYS})
            if change.operation != "DELETE":
                self._compare_image(change, "new", now, {way: ways[way].new for way in WAYS})

    def _compare_image(self, change: Change, side: Side, truth: Truth, ways: dict[Way, set[int]]) -> None:
        row = (change.relation.name, _key(change, side))
        expected, failed = truth.shown.get(row, set()), truth.failed.get(row, set())
        self.tally.pairs += len(self.users)
        self.tally.shown += len(expected)
        for way, decided in ways.items():
            for number in decided - expected:
                kind: Kind = "raised" if number in failed else "leak"
                self._shown(Mismatch(kind, way, side, change, self.users[number]))
            for number in expected - decided:
                self._missed(Mismatch("miss", way, side, change, self.users[number]), truth, number)

    def _shown(self, leak: Mismatch) -> None:
        if leak.kind == "raised" and leak.change.relation.name not in NEVER_RAISED:
            self.tally.raised += 1
        else:
            self.tally.mismatches.append(leak)

    def _missed(self, miss: Mismatch, truth: Truth, number: int) -> None:
        table = miss.change.relation.name
        if self.engine.refuses(table, miss.user):
            self.tally.refused[table] += 1
        elif miss.side == "old" and not miss.change.relation.full:
            self.tally.undecidable += 1
        elif (table, number) in truth.raised and table not in RAISED_BY_ROWS:
            self.tally.excused += 1
        elif self.engine.misreads(number):
            self.tally.misread += 1
        else:
            self.tally.mismatches.append(miss)


def _key(change: Change, side: Side) -> int:
    image = change.new if side == "new" or change.old is None else change.old
    assert image is not None
    return int(str(image[change.relation.index["id"]]))
