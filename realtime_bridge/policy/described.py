"""Tables kept in step with the database's own description of them.

Layer: adapters. May import: words, policy.*.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Final

from realtime_bridge.errors import BridgeError
from realtime_bridge.policy.catalog import Catalog, CatalogTable
from realtime_bridge.policy.decision import CANNOT_DECIDE, Decision, Refusal, Surveying, decide
from realtime_bridge.policy.expression import UnsupportedExpression
from realtime_bridge.policy.table import Table

logger = logging.getLogger(__name__)

_UNDESCRIBED: Final[tuple[Mapping[str, str], frozenset[str]]] = ({}, frozenset())


class DescribedTables:
    """Decides tables by what the catalog says of them.

    Args:
        tables: to be decided.
        rules: table → SQL expression, used instead of its policies.
        asking: asks Postgres what policies mean; None where that cannot be asked.
        publication: the one whose changes come through the history; None if nothing can be relied on to come.
        distrusted: tables whose policies Postgres is to decide whole, at the time.

    Attributes:
        followed: tables whose changes come through the history.
    """

    def __init__(
        self,
        catalog: Catalog,
        tables: Mapping[str, Table],
        roles: frozenset[str],
        rules: Mapping[str, str],
        asking: Surveying | None,
        publication: str | None,
        distrusted: Callable[[], Collection[str]],
    ) -> None:
        self.followed: frozenset[str] = frozenset()
        self._catalog = catalog
        self._tables = tables
        self._roles = roles
        self._rules = rules
        self._asking = asking
        self._publication = publication
        self._distrusted = distrusted
        self._is_readable = True
        self._decided_by = _UNDESCRIBED

    @property
    def rights(self) -> Mapping[str, str]:
        """See `rights.Rights.rights`: empty of a table that is not there; of none while what holds is in doubt."""
        described, _ = self._decided_by
        if not self._is_readable or self._decided_by is _UNDESCRIBED:
            return {}
        return {name: described.get(name, "") for name in self._tables}

    async def read(self) -> Mapping[str, UnsupportedExpression]:
        """Decide the tables by what the catalog says now; returns those with a rule that cannot be decided, and why.

        Raises:
            DatabaseError: the catalog cannot be read, or Postgres not be asked what policies mean.
        """
        described, followed = await self._look()
        whole = frozenset(self._distrusted())
        refused: dict[str, UnsupportedExpression] = {}
        decided: dict[str, Decision | Refusal] = {}
        for name in self._tables:
            if name not in described:
                decided[name] = Refusal(f"there is no table {name}")
                continue
            try:
                decided[name] = await decide(
                    described[name],
                    self._roles,
                    rule=self._rules.get(name),
                    asking=self._asking,
                    whole=name in whole,
                )
            except UnsupportedExpression as error:
                decided[name] = Refusal(CANNOT_DECIDE.format(name), "BRIDGE_POLICIES", error.part)
                refused[name] = error
        for name, found in decided.items():  # once all is known: what is half read would be decided without its facts
            table = self._tables[name]
            if isinstance(found, Refusal):
                table.refuse(self._roles, found)
            elif found.digest != table.digest:
                table.adopt(found)
        self._decided_by = _digests(described), whole
        self.followed = followed
        return refused

    async def outdated(self) -> bool:
        """Whether the tables are decided by something else than what holds now; not where that cannot be asked."""
        try:
            described, followed = await self._look()
        except BridgeError as error:
            if self._is_readable:
                logger.warning("policies cannot be watched", extra={"reason": error.detail})
            self._is_readable = False
            return False
        self._is_readable = True
        return followed != self.followed or (_digests(described), frozenset(self._distrusted())) != self._decided_by

    def doubt(self, table: str) -> None:
        """Show nothing of a table, or of any, before the catalog has been read again."""
        self._decided_by = _UNDESCRIBED
        for known in [self._tables[table]] if table in self._tables else self._tables.values():
            known.doubt(self._roles)

    async def _look(self) -> tuple[Mapping[str, CatalogTable], frozenset[str]]:
        """The tables as the database describes them, and those whose changes come through the history."""
        described = await self._catalog.read(list(self._tables), sorted(self._roles), self._rules)
        followed = await self._catalog.published(self._publication) if self._publication else ()
        return described, frozenset(followed)


def _digests(described: Mapping[str, CatalogTable]) -> dict[str, str]:
    return {name: table.digest for name, table in described.items()}
