"""`realtime-bridge why`: why a user sees a row, or does not."""

from typing import Annotated, Final

import orjson
import typer

from realtime_bridge.claims import Claims
from realtime_bridge.cli.token import make_claims
from realtime_bridge.settings import Settings

_TTL_SECONDS: Final = 3600


def why(
    table: Annotated[str, typer.Option(help="`schema.table`, one of BRIDGE_TABLES.")],
    key: Annotated[str, typer.Option(help="The row's primary key: its value, or `column=value,column=value`.")],
    user: Annotated[
        str | None, typer.Option(help="The user's id (`sub`); leave it out for who is not signed in.")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="The Postgres role; left out: `authenticated`, or `anon` without a user.")
    ] = None,
    claims: Annotated[str, typer.Option(help="Further claims of the token, as one JSON object.")] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show why a user sees a row, or does not: grants, every policy, what its parts come to, and how that was decided.

    Postgres is asked, too: where it says otherwise, that is told and the exit status is 1. What is printed depends on
    the row, whoever may see it: this is for who holds DATABASE_URL, which the row is read with.
    """
    from realtime_bridge.cli.reasons import tell  # the other commands start without it

    settings = Settings.load(whole=False)
    raise typer.Exit(tell(settings, table, key, _claims(settings, user, role, claims), as_json=as_json))


def _claims(settings: Settings, user: str | None, role: str | None, further: str) -> Claims:
    """The claims of a token that `realtime-bridge token` would make."""
    try:
        parsed = orjson.loads(further)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise typer.BadParameter("not a JSON object", param_hint="--claims")
    if {"sub", "role"} & parsed.keys():
        raise typer.BadParameter("sub and role have options of their own", param_hint="--claims")
    named = role or ("anon" if user is None else "authenticated")
    values = make_claims(
        user, role=named, ttl=_TTL_SECONDS, audience=settings.audience, issuer=settings.issuer, further=parsed
    )
    return Claims(values, named, user, None)
