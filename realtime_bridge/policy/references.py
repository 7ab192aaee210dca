"""What a change of one table puts in doubt of what is known for others: policies may refer to any table.

Layer: adapters (it does no I/O). May import: words, canonical, policy.*.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from realtime_bridge.canonical import canonical
from realtime_bridge.change import ABSENT, Change, Image, Relation, Value
from realtime_bridge.policy.expression import Asked, Query


class Kind(Enum):
    """For how long an answer of Postgres holds."""

    CLAIMS = auto()
    """As long as the claims: nothing else is read."""
    TRACKED = auto()
    """Until one of the tables changes whose changes come through the history."""
    TIMED = auto()
    """Nobody can tell: for `BRIDGE_FACT_SECONDS`."""
    VOLATILE = auto()
    """Not at all."""


@dataclass(frozen=True, slots=True)
class Dependency:
    """What an answer depends on.

    Attributes:
        tables: everything that it reads, also by way of functions and of the policies of what is read.
        digest: of what it goes through; another one means that every answer may be another.
    """

    kind: Kind
    tables: frozenset[str] = frozenset()
    digest: str = ""


class Reference(NamedTuple):
    """That what is seen of some tables depends on the rows of another one.

    Attributes:
        tables: those of which something else may be seen when a row changes.
        key: the column of the other table that names the only user concerned; None if it may concern anybody.
        columns: of the other table: an UPDATE that leaves all of them as they are changes nothing; None for any.
    """

    tables: frozenset[str]
    key: str | None
    columns: frozenset[str] | None


def references_of(
    queries: Mapping[Query, tuple[frozenset[str], Dependency]],
) -> dict[str, list[Reference]]:
    """Table → what depends on it, of queries with the tables whose policies have them."""
    found: dict[str, list[Reference]] = {}
    for query, (tables, dependency) in queries.items():
        keys = dict(query.keyed_by)
        for table in dependency.tables:
            named = table in query.reads.tables and table in keys
            columns = {column for of, column in query.reads.references if of == table}
            exact = dependency.tables == query.reads.tables and "*" not in columns
            reference = Reference(tables, keys[table] if named else None, frozenset(columns) if exact else None)
            known = found.setdefault(table, [])
            if reference not in known:
                known.append(reference)
    return found


def asked_by_table(asked: Mapping[Asked, Dependency]) -> dict[str, list[Asked]]:
    """Table → the conditions whose answers depend on it."""
    found: dict[str, list[Asked]] = {}
    for one, dependency in asked.items():
        for table in dependency.tables:
            found.setdefault(table, []).append(one)
    return found


def is_concerned(reference: Reference, change: Change) -> bool:
    """Whether a change can matter at all."""
    if reference.columns is None or change.operation != "UPDATE":
        return True
    images = tuple(_images(change))
    values = ([_value(change.relation, image, column) for image in images] for column in reference.columns)
    return any(old is ABSENT or old != new for old, new in values)


def users_named(change: Change, key: str) -> frozenset[str] | None:
    """The users that a column names or named, as canonical uuids; None if that is not known."""
    found: set[str] = set()
    for image in _images(change):
        value = _value(change.relation, image, key)
        if value is ABSENT:
            return None
        if value is not None:
            found.add(_uuid(str(value)))
    return frozenset(found)


def users_mentioned(change: Change) -> frozenset[str]:
    """Whatever users a row names in any of its columns."""
    relation = change.relation
    columns = [i for i, column in enumerate(relation.columns) if column.type in ("uuid", "text", "varchar")]
    values = (image[i] for image in _images(change) for i in columns if i < len(image))
    return frozenset(_uuid(value) for value in values if isinstance(value, str))


def uid_of(values: Mapping[str, object]) -> str | None:
    """`auth.uid()` by the claims of a token, as canonical uuid."""
    subject = values.get("sub")
    return _uuid(subject) if isinstance(subject, str) else None


def _images(change: Change) -> Iterable[Image]:
    return (image for image in change.images() if image is not None)


def _value(relation: Relation, image: Image, column: str) -> Value:
    i = relation.index.get(column)
    return ABSENT if i is None else image[i]


def _uuid(text: str) -> str:
    try:
        return canonical("uuid", text)
    except ValueError:
        return text
