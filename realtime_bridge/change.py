"""The words of the way of a change: relation, change, control, entry, position.

A source makes bodies (`Change` or `Control`), the broker numbers them into entries, the hub delivers them.
Values stay Postgres' own text until a message is made of them: policies compare text, and nothing is lost.

Layer: words. Imports nothing but errors.
"""

import hashlib
import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, Self, TypeAlias

import orjson

from realtime_bridge.errors import InvalidPositionError

ENTRY_VERSION: Final = 1
REPAIRED_VERSION: Final = 2
"""The same form, of a change that was read back. A bridge that knows the first version alone shows it as a `resync`."""

Operation: TypeAlias = Literal["INSERT", "UPDATE", "DELETE"]
"""As in TG_OP. A TRUNCATE is a `Control` with reason `truncated`."""


class Absent(Enum):
    """The type of `ABSENT`."""

    ABSENT = "absent"

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent.ABSENT
"""A value the source did not bring: an unchanged large value, or one outside the replica identity. Never NULL."""

Value: TypeAlias = str | Literal[Absent.ABSENT] | None
Image: TypeAlias = tuple[Value, ...]
"""A row as column texts (as Postgres' output functions write them), one a column of its relation."""

ResyncReason: TypeAlias = Literal[
    "history_gone", "upstream_gap", "visibility_changed", "truncated", "bulk", "schema_changed"
]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a relation.

    Attributes:
        type: `pg_type.typname`, of the base type where the column's type is a domain: `int8`, `_text`, `timestamptz`.
    """

    name: str
    type: str


@dataclass(frozen=True)
class Relation:
    """A table as it was when a change was written.

    Attributes:
        key: indices of the primary key's columns, in column order; empty if there is none.
        full: whether old images hold every column (REPLICA IDENTITY FULL).
    """

    schema: str
    table: str
    columns: tuple[Column, ...]
    key: tuple[int, ...]
    full: bool

    @cached_property
    def name(self) -> str:
        """`schema.table`, the word by which everything else knows it."""
        return f"{self.schema}.{self.table}"

    @cached_property
    def index(self) -> dict[str, int]:
        """Column name to index."""
        return {column.name: i for i, column in enumerate(self.columns)}

    @cached_property
    def encoded(self) -> bytes:
        """The canonical form, as the broker keeps it."""
        columns = [[c.name, c.type] for c in self.columns]
        return orjson.dumps([self.schema, self.table, columns, list(self.key), self.full])

    @cached_property
    def version(self) -> str:
        """A digest of the canonical form: 16 hexadecimal digits."""
        return hashlib.blake2b(self.encoded, digest_size=8).hexdigest()

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Read the canonical form."""
        schema, table, columns, key, full = orjson.loads(data)
        return cls(schema, table, tuple(Column(*c) for c in columns), tuple(key), full)

    def key_of(self, image: Image) -> tuple[Value, ...]:
        """The primary key's texts in an image."""
        return tuple(image[i] for i in self.key)


@dataclass(frozen=True, slots=True)
class Change:
    """One committed row change.

    Attributes:
        old: the row before: whole if the relation is `full`, else the key only (the rest ABSENT), or None.
            None for an INSERT, and for an UPDATE of which the source brought no old row (then the key is unchanged).
        new: the row after; None for a DELETE.
        commit_time: microseconds since 1970 in UTC.
        place: the source's own name for where it stood: for people and logs, not for positions.
        repaired: it was read back from its table after a gap: it stands for all changes of the row until then, and
            `commit_time` is when it was read.
    """

    operation: Operation
    relation: Relation
    old: Image | None
    new: Image | None
    commit_time: int
    place: str = ""
    repaired: bool = False

    def images(self) -> tuple[Image | None, Image | None]:
        """The old and the new image, each completed by what the other one proves.

        A value that the new image lacks is an unchanged one; without an old image the key is unchanged.
        """
        before, after = self.old, self.new
        if self.operation == "INSERT":
            return None, after
        if self.operation == "DELETE":
            return before or (ABSENT,) * len(self.relation.columns), None
        assert after is not None, "only a DELETE has no new image"
        if before is None:
            keys = frozenset(self.relation.key)
            return tuple(value if i in keys else ABSENT for i, value in enumerate(after)), after
        if ABSENT in after:
            after = tuple(old if new is ABSENT else new for old, new in zip(before, after, strict=True))
        return before, after


@dataclass(frozen=True, slots=True)
class Control:
    """Something every replica must know at this point of the history; no client is sent it as such.

    Attributes:
        kind: `resync`: copies of the table may be out of date (clients are told). `catalog`: the table's policies,
            grants or columns may have changed: read them again before what follows is decided. With a reason they have,
            and readers from before are told.
        table: `schema.table`, or `*`.
        since: of a `resync` that concerns only readers who may have read the table later than this, in microseconds
            since 1970; None if it concerns all.
    """

    kind: Literal["resync", "catalog"]
    table: str
    reason: ResyncReason | None = None
    commit_time: int = 0
    place: str = ""
    since: int | None = None


Body: TypeAlias = Change | Control


@dataclass(frozen=True, slots=True)
class Entry:
    """A body with its place in the history.

    Attributes:
        number: 1, 2, 3 … without holes within an epoch and across its forks.
        id: unlike any other entry's, also one of the same number in a lost branch of the history.
        previous: the `id` of the entry before; empty for the first.
        size: bytes of the encoded body.
    """

    number: int
    id: str
    previous: str
    body: Body
    size: int = field(default=0, compare=False)


def transaction_of(entry: Entry) -> object:
    """What entries that follow each other have in common if, and as far as anybody can tell only if, one commit did."""
    return entry.body.commit_time or entry.id


_POSITION: Final = re.compile(r"([a-z0-9]{4,32})-(0|[1-9][0-9]{0,17})(?:-([1-9][0-9]{0,17}))?")


class Position(NamedTuple):
    """A place in the history: everything up to and including `number` lies behind the reader.

    Attributes:
        told: a digest of what its reader sees, if it was told to read again behind the entry, and by no other; or 0.
    """

    epoch: str
    number: int
    told: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}" + (f"-{self.told}" if self.told else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a position as `str` writes it.

        Raises:
            InvalidPositionError: it cannot be one of ours.
        """
        match = _POSITION.fullmatch(text)
        if match is None:
            raise InvalidPositionError(text)
        return cls(match[1], int(match[2]), int(match[3] or 0))


# -- the form that the broker keeps ----------------------------------------------------------------------------------


def _pack(image: Image | None) -> list[Any] | None:
    return None if image is None else [False if value is ABSENT else value for value in image]


def _unpack(image: list[Any] | None) -> Image | None:
    return None if image is None else tuple(ABSENT if value is False else value for value in image)


def encode_body(body: Body) -> bytes:
    """Encode a body for the history: compact JSON that begins with the format's version.

    Relations are named by their version; the broker keeps them beside the history.
    """
    if isinstance(body, Change):
        fields = [
            REPAIRED_VERSION if body.repaired else ENTRY_VERSION,
            body.operation,
            body.relation.version,
            _pack(body.old),
            _pack(body.new),
            body.commit_time,
            body.place,
        ]
    else:
        fields = [
            ENTRY_VERSION,
            body.kind,
            body.table,
            body.reason,
            body.since,  # which a bridge that does not know it takes for None: it tells all
            body.commit_time,
            body.place,
        ]
    return orjson.dumps(fields)


def relation_version(data: bytes) -> str | None:
    """Which relation an encoded body needs, or None.

    Raises:
        ValueError: a later version of the bridge wrote it in a form that this one does not know.
    """
    fields = _fields(data)
    return fields[2] if fields[1] in ("INSERT", "UPDATE", "DELETE") else None


def decode_body(data: bytes, relations: dict[str, Relation]) -> Body:
    """Read what `encode_body` wrote.

    Raises:
        KeyError: the relation is not in `relations` (its argument is the version that is missing).
        ValueError: a later version of the bridge wrote it in a form that this one does not know.
    """
    version, word, subject, a, b, commit_time, place = _fields(data)
    if word in ("INSERT", "UPDATE", "DELETE"):
        repaired = version == REPAIRED_VERSION
        return Change(word, relations[subject], _unpack(a), _unpack(b), commit_time, place, repaired)
    return Control(word, subject, a, commit_time, place, b)


def _fields(data: bytes) -> list[Any]:
    fields: list[Any] = orjson.loads(data)
    if fields[0] not in (ENTRY_VERSION, REPAIRED_VERSION):
        raise ValueError(f"entry of format {fields[0]}, this bridge reads up to {REPAIRED_VERSION}")
    return fields
