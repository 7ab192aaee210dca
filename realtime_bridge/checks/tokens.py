"""Checks of what tokens are verified with.

To add one: write a function of `Settings` and name it in the tuple.

Layer: whole. May import: settings, errors, checks.*, bridge.
"""

from typing import Final

from realtime_bridge.bridge import make_verifier
from realtime_bridge.checks.finding import Outcome, ok, problem, warning
from realtime_bridge.errors import ConfigurationError
from realtime_bridge.settings import Settings


def jwt_secret(settings: Settings) -> Outcome:
    """Whoever guesses it can be anybody."""
    try:
        verifier = make_verifier(settings)
    except ConfigurationError as error:
        return problem(str(error))
    if settings.supabase_jwt_secret is None:
        return ok("Tokens are verified by the project's public keys alone.")
    if verifier.weak_secret:
        return warning(
            "SUPABASE_JWT_SECRET is shorter than 32 bytes, so it can be guessed from a single token; change it here "
            "and where tokens are signed.",
            "SUPABASE_JWT_SECRET=$(openssl rand -base64 48)",
        )
    return ok("SUPABASE_JWT_SECRET is long enough.")


TOKEN_CHECKS: Final = (jwt_secret,)
