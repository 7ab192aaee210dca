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
            reference = _reference(table, tables, depends)
            known = found.setdefault(table, [])
            if reference not in known:
                known.append(reference)
    return found


def _reference(table: str, tables: frozenset[str], depends: Dependencies) -> Reference:
    keys = frozenset(column for keyed, column in depends.keyed_by if keyed == table)
    columns = frozenset(column for read, column in depends.references if read == table)
    is_exact = depends.keeping is Keeping.TRACKED and "*" not in columns
    return Reference(tables, keys, columns if is_exact else None)


def asked_by_table(asked: Mapping[Asked, Dependencies]) -> dict[str, list[tuple[Asked, Reference]]]:
    """Table → the conditions whose answers depend on it, and how."""
    found: dict[str, list[tuple[Asked, Reference]]] = {}
    for one, depends in asked.items():
        for table in depends.tables:
            found.setdefault(table, []).append((one, _reference(table, frozenset({one.table}), depends)))
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


def texts_of(change: Change) -> frozenset[str]:
    """Whatever a row may name users by: the values of its columns, uuids as canonical ones."""
    return frozenset(_uuid(value) for image in _images(change) for value in image if isinstance(value, str))


def names_of(values: Mapping[str, object]) -> frozenset[str]:
    """What rows can name a user by, from the claims of a token: `auth.uid()` as canonical uuid, and `auth.email()`."""
    told = (values.get("sub"), values.get("email"))
    return frozenset(_uuid(name) for name in told if isinstance(name, str) and name)


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
