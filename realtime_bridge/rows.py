"""Old rows for changes that come without: kept in the broker's row index, and put in before the changes are appended.

A row is written there in the same step as the change that made it is appended, so the next change of its key finds what
was before. What has not changed for long is read from the tables (`seeding`). A row so read may be newer than a change
that is still on its way: it counts as the old row of changes only that were committed after it was read. What is not
known stays as the source brought it, and downstream nobody is shown what could not be decided.

Of a source that may lose changes unheard, the old row that a change brings need not be the one that was told last. What
was told is in the index: that counts as the old row, and a row in whose place another one comes is told as deleted. A
row that was brought incomplete is marked, since a change of what it lacks may be among the lost ones. Of a table in
repair (`repair`), a row that is not in the index is one that nobody was told of.

The rows of a table are laid out as one relation says, which is noted beside them. Another relation, a gap in what the
source tells: the table begins anew, in the same step, and is read again.

Layer: core. May import: words, pgoutput, broker.base, sources.base.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Self, TypeAlias

import orjson

from realtime_bridge.broker.base import NOTE, Broker, RowChange
from realtime_bridge.change import ABSENT, Body, Change, Control, Image, Relation, Value
from realtime_bridge.pgoutput import filled
from realtime_bridge.sources.base import TEXT_BYTES

_FORMAT: Final = 1
"""Of the texts in the row index: with another one a table begins anew."""
_INCOMPLETE: Final = -1
"""In place of the time of reading: a change brought the row, but not all of it."""

Texts: TypeAlias = dict[str, bytes | None]
"""Field of a table in the row index → its text."""


@dataclass
class IndexState:
    """What the row index is doing, for metrics.

    Attributes:
        unknown: changes whose old row was not to be had, by this process.
        size: bytes, all tables together.
        left_out: rows that found no room; the rest of such a table is not read.
        unread: tables of which not all rows have been read yet.
    """

    unknown: int = 0
    size: int = 0
    left_out: int = 0
    unread: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """What is noted of a table.

    Attributes:
        relation: how its rows are laid out.
        whole_at: seconds since 1970: by then all rows had been read, and those that found room are there; 0 before.
    """

    relation: Relation
    whole_at: int = 0

    @property
    def change(self) -> RowChange:
        """Notes it."""
        return RowChange(self.relation.name, NOTE, b"%d %d " % (_FORMAT, self.whole_at) + self.relation.encoded)

    @classmethod
    def decode(cls, text: bytes | None) -> Self | None:
        """Read what is noted; None if there is nothing, or nothing that this version of the bridge can read."""
        if text is None:
            return None
        form, whole_at, relation = text.split(b" ", 2)
        return cls(Relation.decode(relation), int(whole_at)) if form == b"%d" % _FORMAT else None


def is_indexed(relation: Relation) -> bool:
    """Whether its changes come without what was before, and their rows can be told apart."""
    return bool(relation.key) and not relation.full


def field_of(relation: Relation, row: Image) -> str | None:
    """The field of a row; None if its key is not known."""
    key = relation.key_of(row)
    return None if ABSENT in key else orjson.dumps(key).decode()


def encode_row(row: Image, read_at: int | None = None) -> bytes:
    """A row's text in the index; `read_at` as in `Page`, None for one that a change brought."""
    if read_at is None:
        read_at = _INCOMPLETE if ABSENT in row else 0
    return orjson.dumps([read_at, *(False if is_left_out(value) else value for value in row)])


def decode_row(text: bytes, before: float = math.inf) -> Image | None:
    """The row as it was right before a change of that commit time; None if the change may be in it already."""
    read_at, *row = orjson.loads(text)
    return tuple(ABSENT if value is False else value for value in row) if read_at < before else None


def is_incomplete(text: bytes) -> bool:
    """Whether a change brought not all of that row: what it lacked may have changed before, unheard."""
    return text.startswith(b"[%d," % _INCOMPLETE)


def is_left_out(value: Value) -> bool:
    """Whether a value is not kept of a row."""
    return value is ABSENT or (value is not None and len(value.encode()) > TEXT_BYTES)


class RowIndex:
    """The row index during one term of leading.

    Nothing of it is believed from memory but what the source has told: each step asks the broker.

    Args:
        tables: `schema.table` each; what is not among them is left as the source brings it.
        is_lossy: as of the source: what was told counts for more than what the source says of it.

    Attributes:
        tables: as given.
        turn: held from reading rows to the append that changes them.
        begun: the source is read, from behind everything that the index shows.
        doubted: something may be missing of a table.
        told: the newest relation of each table of which the source has brought a change in this term.
        generations: how often each table has lost its rows in this term: what was read before must not be stored.
        touched: table in repair → fields of which changes have told since its newest doubt. Another doubt puts another
            set there, and so does the loss of the table's rows.
    """

    def __init__(self, broker: Broker, tables: Sequence[str], state: IndexState, *, is_lossy: bool = False) -> None:
        self.turn = asyncio.Lock()
        self.begun = asyncio.Event()
        self.doubted = asyncio.Event()
        self.told: dict[str, Relation] = {}
        self.generations: Counter[str] = Counter()
        self.touched: dict[str, set[str]] = {}
        self.tables = tables
        self._broker = broker
        self._state = state
        self._is_lossy = is_lossy

    async def complete(self, bodies: Sequence[Body]) -> tuple[list[Body], list[RowChange]]:
        """The bodies with the old rows that are known, and what their append changes in the index.

        Of a table in repair the end of a row that nobody was told of is left out, and a change of a key is two changes.
        Of a lossy source the end of a row whose place another one takes is put in.

        Raises:
            BrokerError: the index cannot be read.
        """
        draft = _Draft({table: await self._read(table, fields) for table, fields in self._wanted(bodies).items()})
        return [completed for body in bodies for completed in self._take(body, draft)], draft.changes

    def _wanted(self, bodies: Sequence[Body]) -> dict[str, set[str]]:
        wanted: dict[str, set[str]] = {}
        for body in bodies:
            if isinstance(body, Control):
                wanted |= {table: wanted.get(table, {NOTE}) for table in self._concerned(body)}
            elif self._keeps(body.relation):
                fields = wanted.setdefault(body.relation.name, {NOTE})
                is_new_asked = self._is_lossy or body.relation.name in self.touched
                rows = (_before(body), body.new if is_new_asked else None)
                fields |= {field for row in rows if row is not None and (field := field_of(body.relation, row))}
        return wanted

    async def _read(self, table: str, fields: set[str]) -> Texts:
        asked = list(fields)
        return dict(zip(asked, await self._broker.rows(table, asked), strict=True))

    def _concerned(self, control: Control) -> Sequence[str]:
        if control.kind != "resync" or control.since is not None:
            return ()
        return self.tables if control.table == "*" else (control.table,)

    def _keeps(self, relation: Relation) -> bool:
        return is_indexed(relation) and relation.name in self.tables

    def _take(self, body: Body, draft: "_Draft") -> Sequence[Body]:
        if isinstance(body, Control):
            for table in self._concerned(body):
                self._doubt(table, draft, is_empty=body.reason == "truncated")
            return [body]
        relation = body.relation
        known = self.told.get(relation.name)
        self.told[relation.name] = relation
        if self._keeps(relation):
            note = draft.note(relation.name)
            if note is None or note.relation.version != relation.version:
                self._begin_anew(relation.name, draft, Note(relation))
            return self._complete(body, draft)
        if known != relation:  # from now on nothing keeps its rows up to date
            self._begin_anew(relation.name, draft, None)
        return [body]

    def _doubt(self, table: str, draft: "_Draft", *, is_empty: bool) -> None:
        """Forget the rows of a table; of one that is empty, all are there nevertheless."""
        note = draft.note(table)
        if note is not None:
            self._begin_anew(table, draft, Note(note.relation, note.whole_at if is_empty else 0))

    def _begin_anew(self, table: str, draft: "_Draft", note: Note | None) -> None:
        draft.begin_anew(table, note)
        self.generations[table] += 1
        if table in self.touched:
            self.touched[table] = set()
        self.doubted.set()

    def _complete(self, change: Change, draft: "_Draft") -> Sequence[Change]:
        relation, before, new = change.relation, _before(change), change.new
        leaving, coming = (None if row is None else field_of(relation, row) for row in (before, new))
        if (before is not None and leaving is None) or (new is not None and coming is None):
            # Some row is not any more what it is taken for.
            self._begin_anew(relation.name, draft, Note(relation))
            return [change]
        if relation.name in self.touched:
            return self._retold(change, leaving, coming, draft)
        old = None if before is None or leaving is None else self._old(change, before, leaving, draft)
        new = new if new is None or old is None else filled(new, old)
        replaced = self._replaced(change, coming, draft) if coming != leaving else []
        if leaving is not None and leaving != coming:
            draft.put(relation.name, leaving, None)
        if coming is not None and new is not None:
            draft.put(relation.name, coming, encode_row(new))
        return [*replaced, replace(change, old=old, new=new)]

    def _replaced(self, change: Change, coming: str | None, draft: "_Draft") -> list[Change]:
        """The end of the row in whose place another one comes, which was lost."""
        text = draft.get(change.relation.name, coming) if self._is_lossy and coming is not None else None
        row = None if text is None else decode_row(text, change.commit_time)
        return [] if row is None else [replace(change, operation="DELETE", old=row, new=None)]

    def _old(self, change: Change, before: Image, leaving: str, draft: "_Draft") -> Image | None:
        """The old row as far as it is known; what the source brought of it, if nothing more is."""
        is_whole = ABSENT not in before
        if is_whole and not self._is_lossy:
            return before
        text = draft.get(change.relation.name, leaving)
        row = None if text is None else decode_row(text, change.commit_time)
        if row is None:
            self._state.unknown += not is_whole
            return before if is_whole else change.old
        return filled(row, before) if self._is_lossy else filled(before, row)

    def _retold(self, change: Change, leaving: str | None, coming: str | None, draft: "_Draft") -> list[Change]:
        """A change of a table in repair, as it looks to those who were told what is in the index."""
        table = change.relation.name
        if not change.repaired:
            self.touched[table] |= {field for field in (leaving, coming) if field is not None}
        retold: list[Change] = []
        if leaving is not None and leaving != coming and (text := draft.get(table, leaving)) is not None:
            draft.put(table, leaving, None)
            retold.append(replace(change, operation="DELETE", old=decode_row(text), new=None))
        if coming is not None and change.new is not None:
            text = draft.get(table, coming)
            draft.put(table, coming, encode_row(change.new))
            old = None if text is None else decode_row(text)
            retold.append(replace(change, operation="INSERT" if old is None else "UPDATE", old=old))
        return retold


def _before(change: Change) -> Image | None:
    """What a change itself tells of the row before; None if there was none."""
    if change.operation == "INSERT":
        return None
    if change.old is not None:
        return change.old
    assert change.new is not None, "only a DELETE has no new row, and it has an old one"
    keys = frozenset(change.relation.key)  # which is unchanged, since nothing was told of it
    return tuple(value if i in keys else ABSENT for i, value in enumerate(change.new))


class _Draft:
    """The row index as it will be behind the bodies so far: those of one batch see each other's rows.

    Args:
        texts: what the broker has of every field that may be asked for, by table.
    """

    def __init__(self, texts: Mapping[str, Texts]) -> None:
        self._texts = dict(texts)
        self._notes: dict[str, Note | None] = {}
        self._changes: dict[tuple[str, str | None], RowChange] = {}

    @property
    def changes(self) -> list[RowChange]:
        """What to append: of each field the last change, behind its table's beginning anew."""
        return list(self._changes.values())

    def note(self, table: str) -> Note | None:
        if table not in self._notes:
            self._notes[table] = Note.decode(self.get(table, NOTE))
        return self._notes[table]

    def get(self, table: str, field: str) -> bytes | None:
        return self._texts.get(table, {}).get(field)

    def put(self, table: str, field: str, text: bytes | None) -> None:
        self._texts.setdefault(table, {})[field] = text
        self._changes[table, field] = RowChange(table, field, text)

    def begin_anew(self, table: str, note: Note | None) -> None:
        """Nothing is left of a table but what is noted now."""
        self._texts[table] = {}
        self._notes[table] = note
        self._changes = {key: change for key, change in self._changes.items() if key[0] != table}
        self._changes[table, None] = RowChange(table)
        if note is not None:
            self._changes[table, NOTE] = note.change
