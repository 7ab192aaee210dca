"""Checks of the project that the `supabase` source subscribes to.

To add one: write a function of `Settings` and name it in the tuple.

Layer: whole. May import: settings, errors, checks.*, sources.
"""

import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import jwt

from realtime_bridge.checks.finding import Finding, Outcome, failed, find, named, ok, problem, skip, warning
from realtime_bridge.errors import ConfigurationError, SourceError
from realtime_bridge.settings import Settings
from realtime_bridge.sources.base import Source

_WHERE_KEYS_ARE: Final = "it is in the project's settings under API keys"
_HOSTED: Final = ".supabase.co"


def supabase_url(settings: Settings) -> Outcome:
    """Often pasted with the path of one of the project's services."""
    parts = _address(settings)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        return problem("SUPABASE_URL is not an address.", "SUPABASE_URL=https://<project>.supabase.co")
    whole = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    if parts.path.strip("/") or parts.query:
        return problem("SUPABASE_URL is more than the project's address.", f"SUPABASE_URL={whole}")
    if parts.scheme == "http" and parts.hostname.endswith(_HOSTED):
        return problem("SUPABASE_URL would send the service key unencrypted.", f"SUPABASE_URL=https://{parts.hostname}")
    return ok(f"SUPABASE_URL leads to {parts.hostname}.")


def supabase_key(settings: Settings) -> Outcome:
    """With any other key, the project shows what that key's policies show: nothing, mostly."""
    key = _key(settings)
    if key.startswith("sb_secret_"):
        return ok("SUPABASE_KEY is a secret key.")
    if key.startswith("sb_publishable_"):
        return problem(f"SUPABASE_KEY is a publishable key; the bridge needs the secret one ({_WHERE_KEYS_ARE}).")
    claims = _claims(key)
    if claims is None:
        return warning("SUPABASE_KEY is neither an sb_secret_… key nor a JWT.")
    if claims.get("role") != "service_role":
        return problem(
            f"SUPABASE_KEY is a key of role {claims.get('role')}, which sees only what its policies show; the bridge "
            f"needs the service_role key ({_WHERE_KEYS_ARE})."
        )
    if isinstance(ends := claims.get("exp"), int | float) and ends <= time.time():
        return problem(f"SUPABASE_KEY has expired; take the present one ({_WHERE_KEYS_ARE}).")
    return ok("SUPABASE_KEY is a service_role key.")


def supabase_project(settings: Settings) -> Outcome | None:
    """A legacy key names its project."""
    parts, claims = _address(settings), _claims(_key(settings))
    host = "" if parts is None else parts.hostname or ""
    if claims is None or "ref" not in claims or not host.endswith(_HOSTED):
        return None
    project = host.removesuffix(_HOSTED)
    if claims["ref"] != project:
        return problem(
            f"SUPABASE_KEY is of another project than SUPABASE_URL ({project}).",
            f"SUPABASE_URL=https://{claims['ref']}{_HOSTED}",
        )
    return ok("SUPABASE_URL and SUPABASE_KEY are of the same project.")


SUPABASE_CHECKS: Final = (supabase_url, supabase_key, supabase_project)


async def look_at_supabase(settings: Settings, source: Source) -> list[Finding]:
    """The project's address and key, and whether Realtime subscribes with them."""
    findings = find(SUPABASE_CHECKS, settings)
    if failed(findings):
        return findings + skip([realtime], "address or key are wrong")
    return [*findings, named(realtime.__name__, await realtime(source))]


async def realtime(source: Source) -> Outcome:
    """Subscribe to the tables and leave again; takes as long as the project does, half a minute at most."""
    try:
        await source.check()
    except ConfigurationError as error:
        return problem(str(error))
    except SourceError as error:
        return problem(f"{error}. Is the project paused, or Realtime switched off in its settings?")
    return ok("Supabase Realtime has subscribed to the tables.")


def _address(settings: Settings) -> SplitResult | None:
    try:
        parts = urlsplit(settings.supabase_url or "")
        _ = parts.port
    except ValueError:
        return None
    return parts


def _key(settings: Settings) -> str:
    return settings.supabase_key.get_secret_value() if settings.supabase_key else ""


def _claims(key: str) -> Mapping[str, Any] | None:
    """What a JWT says of itself; it is only the operator whom it could deceive."""
    try:
        claims: Mapping[str, Any] = jwt.decode(key, options={"verify_signature": False})
    except jwt.PyJWTError:
        return None
    return claims
