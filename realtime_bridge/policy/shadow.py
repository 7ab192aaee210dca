"""Compares a small random sample of what was decided with what Postgres says of the whole policies.

Compiling is proven by tests; this is the guard in production, against what no test has met. Now and then one change is
drawn, with a member who was shown it and one of those who might have been. A difference alone proves nothing, since
facts change: it counts if the compiled policy, with facts asked for anew, and Postgres differ again and again.

Layer: adapters. May import: words, policy.*.
"""

import asyncio
import logging
import random
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Final, NamedTuple, NoReturn

from realtime_bridge.change import Change
from realtime_bridge.errors import BridgeError
from realtime_bridge.policy.base import Audience, Member
from realtime_bridge.policy.case import Case, learn
from realtime_bridge.policy.catalog import CatalogTable
from realtime_bridge.policy.decision import Decision, decide
from realtime_bridge.policy.expression import UnsupportedExpression
from realtime_bridge.policy.index import Members
from realtime_bridge.policy.keeping import Keeping
from realtime_bridge.policy.knowledge import Asking
from realtime_bridge.policy.predicate import Predicate

logger = logging.getLogger(__name__)

SAMPLE_SECONDS: Final = 5.0
"""One change in so many seconds is drawn: what it costs does not grow with the traffic."""
_ROUNDS: Final = 3
_PAUSE_SECONDS: Final = 0.5


class _Sample(NamedTuple):
    """One image and one user, and whether that was shown this."""

    decision: Decision
    case: Case
    shown: bool


class Shadow:
    """Draws samples, and checks them in the background.

    Args:
        rules: table → expression used in place of its policies.

    Attributes:
        checked: comparisons made.
        mismatches: compiled policies that were found to differ from Postgres.
        distrusted: tables of which that is so: Postgres has to decide them whole.
    """

    def __init__(
        self,
        asking: Asking,
        roles: Collection[str],
        rules: Mapping[str, str],
        *,
        seconds: float = SAMPLE_SECONDS,
    ) -> None:
        self.checked = self.mismatches = 0
        self.distrusted: set[str] = set()
        self._asking = asking
        self._roles = roles
        self._rules = rules
        self._seconds = seconds
        self._drawn: list[_Sample] = []
        self._seen = 0

    def note(self, change: Change, audience: Audience, decision: Decision, members: Members) -> None:
        """Perhaps draw a change that was decided: of all since the last check each as likely as any other.

        Args:
            change: of the table that was decided.
            audience: what came out.
            decision: by what.
            members: who might have been shown it.
        """
        self._seen += 1
        if random.random() * self._seen >= 1 or decision.table.name in self.distrusted:
            return
        self._drawn = []
        for image, shown in zip(change.images(), (audience.old, audience.new), strict=True):
            if image is None:
                continue
            for member in {*_any_of(shown), *_any_of(members)} - audience.unknown:
                case = Case(decision.table, member.claims, change.relation, image)
                self._drawn.append(_Sample(decision, case, member in shown))

    async def run(self) -> NoReturn:
        """Check what is drawn, for ever."""
        while True:
            await asyncio.sleep(self._seconds)
            samples, self._drawn, self._seen = self._drawn, [], 0
            for sample in samples:
                try:
                    await self._check(sample)
                except (BridgeError, UnsupportedExpression) as error:
                    logger.debug("a sample could not be checked", extra={"reason": type(error).__name__})

    async def _check(self, sample: _Sample) -> None:
        table, role = sample.case.table, sample.case.claims.role
        rule = self._rules.get(table.name)
        whole = await decide(table, self._roles, rule=rule, asking=self._asking, whole=True)
        compiled, asked = sample.decision.predicates.get(role), whole.predicates.get(role)
        if compiled is None or asked is None or not _is_steady(asked, table):
            return
        shown: bool | None = sample.shown
        for _ in range(_ROUNDS):
            theirs = await self._decide(asked, sample)
            if theirs is None or shown is None:
                return
            self.checked += 1
            if theirs is shown:
                return
            await asyncio.sleep(_PAUSE_SECONDS)
            shown = await self._decide(compiled, sample)
        self.mismatches += 1
        self.distrusted.add(table.name)
        details = {"table": table.name, "role": role}
        logger.error("a compiled policy differs from Postgres, which decides that table from now on", extra=details)

    async def _decide(self, predicate: Predicate, sample: _Sample) -> bool | None:
        """Whether a user sees an image by a predicate, with everything asked for anew; None if that is not known."""
        known = await learn(sample.case, [predicate], self._asking)
        if known.absent or known.failed:
            return None
        return predicate.evaluate(sample.case.relation.index, sample.case.image, known.facts)


def _any_of(members: Members) -> list[Member]:
    """One of them, if there is any."""
    first = random.randrange(len(members)) if members else 0
    return list(islice(members, first, first + 1))


def _is_steady(predicate: Predicate, table: CatalogTable) -> bool:
    """Whether it can be expected to say the same twice."""
    return bool(predicate.asked) and all(
        table.references.dependencies(asked.reads, frozenset()).keeping < Keeping.VOLATILE for asked in predicate.asked
    )
