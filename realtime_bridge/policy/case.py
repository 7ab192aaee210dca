"""One user and one row, and what predicates need to know of them, asked for anew.

For who looks at a single decision and must not rest on what is known already: the shadow check, and explanations.

Layer: adapters. May import: words, policy.*.
"""

from collections.abc import Collection
from typing import NamedTuple

from realtime_bridge.change import ABSENT, Image, Relation, Value
from realtime_bridge.claims import Claims
from realtime_bridge.policy.atoms import Facts, Failed, Memo
from realtime_bridge.policy.base import Member
from realtime_bridge.policy.catalog import CatalogTable
from realtime_bridge.policy.expression import Claim, Query
from realtime_bridge.policy.facts import read_facts
from realtime_bridge.policy.index import Question
from realtime_bridge.policy.knowledge import Asking
from realtime_bridge.policy.predicate import Predicate


class Case(NamedTuple):
    """A user, and an image of a row of this table."""

    table: CatalogTable
    claims: Claims
    relation: Relation
    image: Image

    def value(self, column: str) -> Value:
        """The column's text; ABSENT if the relation has no such column."""
        place = self.relation.index.get(column)
        return ABSENT if place is None else self.image[place]


class Known(NamedTuple):
    """What predicates need.

    Attributes:
        facts: of the user, and what Postgres answers about the row.
        absent: the names of those that are not known.
        failed: the names of those that Postgres fails to evaluate.
    """

    facts: Facts
    absent: frozenset[str]
    failed: frozenset[str]


async def learn(case: Case, predicates: Collection[Predicate], asking: Asking) -> Known:
    """Ask everything that these predicates may need.

    Raises:
        DatabaseError: Postgres could not be asked.
    """
    facts = {fact for predicate in predicates for fact in predicate.facts}
    member = Member(("", ""), case.claims)
    queries = [fact for fact in facts if isinstance(fact, Query)]
    (found,) = await asking.facts([case.claims], queries) if queries else ({},)
    told = {**read_facts([fact for fact in facts if isinstance(fact, Claim)], case.claims.values), **found}
    questions = [
        Question(asked, member, tuple(map(case.value, asked.columns)))
        for asked in {asked for predicate in predicates for asked in predicate.asked}
    ]
    answers = await asking.answers({case.table.name: case.table.declared}, questions) if questions else ()
    memos: dict[str, Memo] = {}
    for question, answer in zip(questions, answers, strict=True):
        memo = memos[question.asked.name] = Memo(lambda _: None)
        memo.store(question.values, answer)
        told[question.asked.name] = answer
    return Known(
        {**told, **memos},
        frozenset(name for name, value in told.items() if value is ABSENT),
        frozenset(name for name, value in told.items() if isinstance(value, Failed)),
    )
