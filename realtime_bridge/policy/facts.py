"""What the policies may know of a user: the values of `auth.uid()`, `auth.role()`, `auth.email()` and `auth.jwt()`.

They are read from the claims here, as the auth functions would read them from `request.jwt.claims`. What Postgres would
refuse (a `sub` that is no uuid), and what cannot be known to be written as Postgres writes it (a number with a fraction
or an exponent, an object or an array as text), is ABSENT: unknown, never NULL.

Layer: adapters (it does no I/O). May import: words, canonical, policy.atoms, policy.expression.
Sources: github:supabase/auth, migrations 20220224000811 and 20220531120530 (the functions' bodies);
jsonb_object_field_text in jsonfuncs.c.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

import orjson

from realtime_bridge.canonical import canonical, cast
from realtime_bridge.change import ABSENT, Value
from realtime_bridge.claims import Claims
from realtime_bridge.policy.atoms import Values
from realtime_bridge.policy.expression import Claim

PER_TOKEN: Final = frozenset({"exp", "iat", "nbf", "jti", "session_id"})
"""Claims that differ between two tokens of one user: they tell members apart only if a policy reads them."""

_CLAIM_OF: Final[Mapping[str, str]] = {"uid": "sub", "role": "role", "email": "email"}


def identity(claims: Claims, kept: frozenset[str]) -> tuple[str, str]:
    """What policies can tell users apart by: role and claims, without those of `PER_TOKEN` that are not kept."""
    values = {name: value for name, value in claims.values.items() if name in kept or name not in PER_TOKEN}
    return claims.role, json.dumps([sorted(kept), values], sort_keys=True, separators=(",", ":"))


def claims_read(facts: Iterable[Claim]) -> frozenset[str]:
    """The top-level claims that these facts are read from."""
    return frozenset(_keys(fact)[0] for fact in facts)


def read_facts(facts: Iterable[Claim], values: Mapping[str, Any]) -> dict[str, Value]:
    """Every claim's canonical text, by its SQL."""
    legible = _is_legible(values)
    return {fact.sql: _read(fact, values) if legible else ABSENT for fact in set(facts)}


def digest_of(*parts: object) -> str:
    """A digest of what visibility rests on: the same in every process for equal parts."""
    return hashlib.blake2b(repr([_stable(part) for part in parts]).encode(), digest_size=8).hexdigest()


def _stable(part: object) -> object:
    """The same with everything in an order that does not depend on the process."""
    if isinstance(part, Mapping):
        return sorted((name, _stable(value)) for name, value in part.items())
    if isinstance(part, Values):
        return sorted(part.texts), part.has_null
    return part


def _keys(fact: Claim) -> tuple[str, ...]:
    head, *keys = fact.path
    return tuple(keys) if head == "jwt" else (_CLAIM_OF[head],)


def _is_legible(values: Mapping[str, Any]) -> bool:
    """Whether Postgres can read the claims at all: one zero character, and every auth function raises."""
    try:
        return b"\\u0000" not in orjson.dumps(dict(values))
    except TypeError:  # a lone surrogate, or an integer that we cannot hand on as it is
        return False


def _read(fact: Claim, values: Mapping[str, Any]) -> Value:
    try:
        text = _as_text(values, _keys(fact))
        if text is None:
            return None
        source = fact.type
        text = canonical(source, text)
        for target in fact.casts:
            text, source = cast(text, source, target), target
    except ValueError:
        return ABSENT
    return text


def _as_text(values: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    """`values -> key … ->> key`: NULL where a key is missing, or where there is no object to look into."""
    value: object = values
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    match value:
        case None | str():
            return value
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
    raise ValueError("only Postgres knows its text")
