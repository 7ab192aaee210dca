"""Checks of what tokens are verified with.

To add one: write a function of `Settings` and name it in the tuple.

Layer: whole. May import: settings, errors, jwks, checks.*, bridge.
"""

from collections.abc import Sequence
from typing import Final

from realtime_bridge.checks.finding import Finding, Outcome, find, named, ok, problem, warning
from realtime_bridge.errors import ConfigurationError, UnavailableError
from realtime_bridge.jwks import Key
from realtime_bridge.parts import make_get_user, make_key_set, make_verifier
from realtime_bridge.settings import Settings

_SECRET: Final = "SUPABASE_JWT_SECRET=<the project's JWT secret>"  # noqa: S105 - where it belongs


def jwt_secret(settings: Settings) -> Outcome:
    """Whoever guesses it can be anybody."""
    try:
        verifier = make_verifier(settings)
    except ConfigurationError as error:
        return problem(str(error))
    if settings.supabase_jwt_secret is None:
        return ok("SUPABASE_JWT_SECRET is not set: tokens are verified by public keys.")
    if verifier.weak_secret:
        return warning(
            "SUPABASE_JWT_SECRET is shorter than 32 bytes, so it can be guessed from a single token; change it here "
            "and where tokens are signed.",
            "SUPABASE_JWT_SECRET=$(openssl rand -base64 48)",
        )
    return ok("SUPABASE_JWT_SECRET is long enough.")


TOKEN_CHECKS: Final = (jwt_secret,)


async def look_at_tokens(settings: Settings) -> list[Finding]:
    """The secret, and the public keys where there is a place to fetch them from."""
    findings = find(TOKEN_CHECKS, settings)
    try:
        key_set = make_key_set(settings)
        if key_set is None:
            return findings
        async with key_set:
            outcome = jwks(settings, *await key_set.read())
    except ConfigurationError as error:
        outcome = problem(str(error))
    except UnavailableError as error:
        told = f"The public keys cannot be fetched ({error}), so tokens signed with them cannot be verified now."
        outcome = problem(told) if settings.supabase_jwt_secret is None else warning(told)
    return [*findings, named(jwks.__name__, outcome)]


def jwks(settings: Settings, keys: Sequence[Key], ignored: Sequence[str]) -> Outcome:
    """A project signs with a secret, or with a key whose other half it publishes, or with both while it changes over.

    Args:
        settings: for what stands in where no key is published.
        keys: those published.
        ignored: why others cannot be used.
    """
    others = f" Of others that are published none can be used: {'; '.join(ignored)}." if ignored else ""
    if keys:
        found = f"Tokens are verified by public keys: {', '.join(sorted({key.algorithm for key in keys}))}.{others}"
        return warning(found) if ignored else ok(found)
    if settings.supabase_jwt_secret is not None:
        found = f"No public key is published: SUPABASE_JWT_SECRET alone verifies tokens.{others}"
        return warning(found) if ignored else ok(found)
    found = "No public key is published, and SUPABASE_JWT_SECRET is not set:"
    if make_get_user(settings) is None:
        return problem(f"{found} no token can be verified.{others}", _SECRET)
    return warning(
        f"{found} the project is asked about every token, which is slower and depends on it; tokens of nobody "
        f"(role anon) are refused.{others}",
        _SECRET,
    )
