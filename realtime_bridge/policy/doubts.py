"""What a change of one table puts in doubt of what is known for others: policies may refer to any table.

Layer: adapters (it does no I/O). May import: words, canonical, policy.expression, policy.keeping.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from realtime_bridge.canonical import canonical
from realtime_bridge.change import ABSENT, Change, Image, Relation, Value
from realtime_bridge.policy.expression import Asked, Query
from realtime_bridge.policy.keeping import Dependencies, Keeping


class Reference(NamedTuple):
    """That what is seen of some tables depends on the rows of another one.

    Attributes:
        tables: those of which something else may be seen when a row changes.
        keys: the columns of the other table that name the only users concerned; empty if it may concern anybody.
        columns: of the other table: an UPDATE that leaves all of them as they are changes nothing; None for any.
    """

    tables: frozenset[str]
    keys: frozenset[str]
    columns: frozenset[str] | None


def references_of(
    queries: Mapping[Query, tuple[frozenset[str], Dependencies]],
) -> dict[str, list[Reference]]:
    """Table → what depends on it, of queries with the tables whose policies have them."""
    found: dict[str, list[Reference]] = {}
    for tables, depends in queries.values():
        for table in depends.tables:
            keys = frozenset(column for keyed, column in depends.keyed_by if keyed == table)
            columns = frozenset(column for read, column in depends.references if read == table)
            is_exact = depends.keeping is Keeping.TRACKED and "*" not in columns
            reference = Reference(tables, keys, columns if is_exact else None)
            known = found.setdefault(table, [])
            if reference not in known:
                known.append(reference)
    return found


def asked_by_table(asked: Mapping[Asked, Dependencies]) -> dict[str, list[Asked]]:
    """Table → the conditions whose answers depend on it."""
    found: dict[str, list[Asked]] = {}
    for one, depends in asked.items():
        for table in depends.tables:
            found.setdefault(table, []).append(one)
    return found


def is_concerned(reference: Reference, change: Change) -> bool:
    """Whether a change can matter at all."""
    if reference.columns is None or change.operation != "UPDATE":
        return True
    images = tuple(_images(change))
    values = ([_value(change.relation, image, column) for image in images] for column in reference.columns)
    return any(old is ABSENT or old != new for old, new in values)


def users_named(change: Change, keys: Iterable[str]) -> frozenset[str] | None:
    """The users that these columns name or named, as canonical uuids; None if that is not known."""
    values = [_value(change.relation, image, key) for image in _images(change) for key in keys]
    if ABSENT in values:
        return None
    return frozenset(_uuid(str(value)) for value in values if value is not None)


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
