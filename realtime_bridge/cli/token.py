"""`realtime-bridge token`: a token for trying things out."""

import time
from collections.abc import Mapping
from typing import Annotated

import jwt
import orjson
import typer

from realtime_bridge.errors import ConfigurationError
from realtime_bridge.settings import Settings


def token(
    sub: Annotated[str, typer.Option(help="The user's id.")],
    role: Annotated[str, typer.Option(help="The Postgres role.")] = "authenticated",
    ttl: Annotated[float, typer.Option(help="Seconds until it ends.", min=1)] = 3600,
    claim: Annotated[list[str] | None, typer.Option(help="A further claim, `name=JSON` or `name=text`.")] = None,
) -> None:
    """Print a token signed with SUPABASE_JWT_SECRET, for BRIDGE_AUDIENCE and by BRIDGE_ISSUER."""
    settings = Settings.load(whole=False)
    if settings.supabase_jwt_secret is None:
        raise ConfigurationError("SUPABASE_JWT_SECRET is missing: nothing to sign with.")
    claims = make_claims(
        sub,
        role=role,
        ttl=ttl,
        audience=settings.audience,
        issuer=settings.issuer,
        further=dict(_parse(text) for text in claim or ()),
    )
    print(make_token(settings.supabase_jwt_secret.get_secret_value(), claims))


def make_token(secret: str, claims: Mapping[str, object]) -> str:
    """An HS256 token as Supabase issues them."""
    return jwt.encode(dict(claims), secret, algorithm="HS256")


def make_claims(
    sub: str | None,
    *,
    role: str,
    ttl: float,
    audience: str = "authenticated",
    issuer: str | None = None,
    further: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What such a token says; `further` claims are added, or replace what is there."""
    now = int(time.time())
    aud = {} if role == "anon" else {"aud": audience}
    iss = {} if issuer is None else {"iss": issuer}
    subject = {} if sub is None else {"sub": sub}
    return {**iss, **aud, **subject, "role": role, "iat": now, "exp": now + int(ttl), **(further or {})}


def _parse(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise typer.BadParameter(f"{text!r} is not of the form name=value", param_hint="--claim")
    try:
        return name, orjson.loads(value)
    except orjson.JSONDecodeError:
        return name, value
