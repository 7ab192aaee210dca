"""Who is asking: the claims of a verified token.

Layer: words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson


@dataclass(frozen=True)
class Claims:
    """The claims of a token that `auth` has verified; nobody else makes one, save tests and the command line.

    Attributes:
        values: all claims, as the token had them.
        role: the Postgres role; one that `BRIDGE_ROLES` allows.
        subject: `sub`, or None for a token of role `anon`.
        expires_at: seconds since 1970; None if the token never ends (only configured keys).
    """

    values: Mapping[str, Any]
    role: str
    subject: str | None
    expires_at: float | None

    @cached_property
    def encoded(self) -> str:
        """What `request.jwt.claims` is set to: the claims as JSON with sorted keys."""
        return orjson.dumps(dict(self.values), option=orjson.OPT_SORT_KEYS).decode()

    @property
    def user(self) -> str:
        """The word for "the same user" in limits and resyncs: the subject, else the role in brackets."""
        return self.subject or f"({self.role})"
