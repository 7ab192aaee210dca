"""The people of the sample: always the same ids, so that what was noted of one run fits the next.

Layer: whole (dev). May import: claims, cli.token.
"""

import uuid
from dataclasses import dataclass
from typing import Final

from realtime_bridge.claims import Claims
from realtime_bridge.cli.token import make_claims, make_token

TOKEN_SECONDS: Final = 86_400
KEY_SECONDS: Final = 10 * 365 * 86_400
_ROLE: Final = "authenticated"
_NAMES: Final = ("ada", "bob", "cleo", "dan", "eve", "finn", "gwen", "hugo")


@dataclass(frozen=True)
class SampleUser:
    """One of them, known by an e-mail address."""

    email: str

    @property
    def id(self) -> str:
        """A uuid that follows from the address."""
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"mailto:{self.email}"))

    @property
    def name(self) -> str:
        """The first part of the address."""
        return self.email.partition("@")[0]

    @property
    def claims(self) -> Claims:
        """As whom this user speaks to Postgres."""
        values = {"sub": self.id, "role": _ROLE, "email": self.email, "aud": "authenticated"}
        return Claims(values, _ROLE, self.id, None)

    def token(self, secret: str) -> str:
        """A token that is good for a day from now."""
        further = {"email": self.email}
        return make_token(secret, make_claims(self.id, role=_ROLE, ttl=TOKEN_SECONDS, further=further))

    def describe(self, secret: str) -> dict[str, str]:
        """The user with a fresh token, as `--print-env` and the page have it."""
        return {"id": self.id, "email": self.email, "token": self.token(secret)}


def sample_users(count: int) -> list[SampleUser]:
    """The first so many of them."""
    names = [*_NAMES, *(f"user{number}" for number in range(len(_NAMES) + 1, count + 1))]
    return [SampleUser(f"{name}@example.com") for name in names[:count]]


def api_key(secret: str, role: str) -> str:
    """A project's key of role `anon` or `service_role`, in the form of a token, as Supabase's older ones are."""
    return make_token(secret, make_claims(None, role=role, ttl=KEY_SECONDS))
