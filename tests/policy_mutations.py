"""Faults of the policy compiler, planted one at a time: whoever compares it with Postgres must find each of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

import pytest

from realtime_bridge import canonical
from realtime_bridge.change import ABSENT
from realtime_bridge.policy import (
    atoms,
    compiler,
    dependence,
    expression,
    index,
    membership,
    ordering,
    predicate,
    reading,
)


@contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Put what `make` makes of an attribute in its place. If there is none, the fault has to be planted elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, make(getattr(owner, name)))
        ordering.order_key.cache_clear()
        yield
    ordering.order_key.cache_clear()


def _not_dropped(want: Any) -> Any:
    return lambda self, node, wanted: want(self, getattr(node, "expression", node) if _is_not(node) else node, wanted)


def _is_not(node: Any) -> bool:
    return isinstance(node, expression.Not)


def _false_for_null(equal: Any) -> Any:
    def mutated(*arguments: Any) -> Any:
        truth = equal(*arguments)
        return False if truth is None else truth

    return mutated


def _holds_if_null(holds: Any) -> Any:
    def mutated(self: Any, *arguments: Any) -> Any:
        return holds(self, *arguments) or self.atom.truth(*arguments) is None

    return mutated


def _everybody_for_nobody(found: Any) -> Any:
    return lambda self, *arguments: found(self, *arguments) or self._members


def _null_for_absent(value: Any) -> Any:
    def mutated(*arguments: Any) -> Any:
        found = value(*arguments)
        return None if found is ABSENT else found

    return mutated


def _null_is_one_column(is_null: Any) -> Any:
    def mutated(self: Any, operand: Any) -> Any:
        is_column = isinstance(operand, expression.Column)
        return atoms.Missing(atoms.RowTerm(operand.name)) if is_column else is_null(self, operand)

    return mutated


_FAULTS: Final[Mapping[str, tuple[Any, str, Callable[[Any], Any]]]] = {
    "NOT is dropped": (compiler._Compiler, "want", _not_dropped),
    "a comparison with a constant NULL is false": (compiler._Compiler, "_equal", _false_for_null),
    "what is NULL holds": (predicate.Literal, "holds", _holds_if_null),
    "an absent value is NULL": (atoms.RowTerm, "value", _null_for_absent),
    "restrictive policies are dropped": (
        predicate,
        "both",
        lambda both: lambda left, right: right if left == predicate.ALWAYS else left,
    ),
    "a conjunction takes one alternative only": (compiler, "both", lambda both: lambda a, b: both(a[:1], b)),
    "a disjunction forgets its last part": (compiler, "either", lambda either: lambda a, b: either(a, b[:-1] or b)),
    "numbers are equal as texts": (compiler, "FORMED_TYPES", lambda types: types - {"numeric"}),
    "NaN is the least number": (ordering, "_UNCOUNTABLE", lambda ranks: {**ranks, "NaN": -2}),
    "years before Christ are forgotten": (
        atoms,
        "order_key",
        lambda key: lambda type_, text: key(type_, text.removesuffix(" BC")),
    ),
    "less and less or equal are exchanged": (
        atoms.Less,
        "truth",
        lambda truth: lambda self, *arguments: truth(replace(self, or_equal=not self.or_equal), *arguments),
    ),
    "the NULL in a set is forgotten": (
        atoms,
        "_is_among",
        lambda among: lambda value, values: among(value, replace(values, has_null=False)),
    ),
    "a NULL is in no set, for certain": (
        atoms,
        "_is_among",
        lambda among: lambda value, values: False if value is None else among(value, values),
    ),
    "the elements of an array are split at commas": (
        atoms,
        "array_elements",
        lambda elements: (
            lambda text: [None if word == "NULL" else word for word in text.strip("{}").split(",") if word]
        ),
    ),
    "uuids are equal as they are written": (
        canonical,
        "_READERS",
        lambda readers: {**readers, "uuid": str},
    ),
    "jsonb is equal as text": (canonical, "_READERS", lambda readers: {**readers, "jsonb": str}),
    "blanks at the end of a char count": (canonical, "_READERS", lambda readers: {**readers, "bpchar": str}),
    "floating numbers are equal as texts": (canonical, "_READERS", lambda readers: {**readers, "float8": str}),
    "the schema of an operator is ignored": (
        reading,
        "name_of",
        lambda name_of: lambda parts: name_of(parts).rpartition(".")[2],
    ),
    "the default of a coalesce is ignored": (
        reading,
        "_CONNECTIVES",
        lambda readers: {**readers, "coalesce_expr": lambda self, _, inner: self.expression(inner.args[0])},
    ),
    "a row of NULLs is not NULL": (compiler._Compiler, "_is_null", _null_is_one_column),
    "EXISTS can be NULL": (
        reading._Reader,
        "_membership",
        lambda membership: lambda *arguments: membership(*arguments).expression,
    ),
    "an IN about another table is never NULL": (
        reading,
        "_CONDITIONS",
        lambda readers: {**readers, "sub_link": lambda *arguments: _exactly(readers["sub_link"](*arguments))},
    ),
    "a sub-select loses its other conditions": (
        membership,
        "_selecting",
        lambda selecting: lambda value, select, conjuncts: selecting(value, select, []),
    ),
    "an answer is kept for another value": (
        expression.Asked,
        "columns",
        lambda _: property(lambda self: tuple(sorted(self.reads.columns))[:-1]),
    ),
    "an answer is kept for another user": (dependence.Dependence, "on_user", lambda _: False),
    "a value that finds nobody finds everybody": (index._Branch, "_found", _everybody_for_nobody),
}


def _exactly(read: Any) -> Any:
    return replace(read, exact=True) if isinstance(read, expression.Leaf) else read


MUTATIONS: Final[Mapping[str, Callable[[], AbstractContextManager[None]]]] = {
    name: partial(_replaced, *fault) for name, fault in _FAULTS.items()
}
"""What is wrong → plants that fault while it is entered.

Faults take effect in what is parsed, compiled or joined while they are planted, so nothing may be kept from before.
"""
