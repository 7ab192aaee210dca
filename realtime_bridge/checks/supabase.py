"""Checks of the project that the `supabase` source subscribes to.

To add one: write a function of `Settings` and name it in the tuple, or one of an `Answer` of PostgREST next to its kin.

Layer: whole. May import: settings, errors, checks.*, bridge.
Sources: https://docs.postgrest.org/en/stable/references/errors.html; the messages of supabase/realtime
(Extensions.PostgresCdcRls.Subscriptions).
"""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import SplitResult, urlsplit
from urllib.parse import quote as url_quote

import httpx
import jwt

from realtime_bridge.checks.facts import SUPABASE_PUBLICATION, quote
from realtime_bridge.checks.finding import Finding, Outcome, failed, find, ok, problem, skip, warning
from realtime_bridge.errors import BridgeError, ConfigurationError, SourceError
from realtime_bridge.parts import make_source
from realtime_bridge.settings import Settings

_REST_SECONDS: Final = 5.0
_REFUSED_TABLE: Final = re.compile(r"Please check Realtime is enabled .*\bschema: ([^,\]]+), table: ([^,\]]+)")
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
    if key.startswith("sb_publishable_"):
        return problem(f"SUPABASE_KEY is a publishable key; the bridge needs the secret one ({_WHERE_KEYS_ARE}).")
    if not (key.isascii() and key.isprintable()):
        return problem(f"SUPABASE_KEY holds characters that no key has; take it anew ({_WHERE_KEYS_ARE}).")
    if key.startswith("sb_secret_"):
        return ok("SUPABASE_KEY is a secret key.")
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


async def look_at_supabase(settings: Settings) -> list[Finding]:
    """The project's address and key, and whether its services answer to them; half a minute if they do not."""
    findings = find(SUPABASE_CHECKS, settings)
    if failed(findings):
        return findings + skip([rest, realtime], "address or key are wrong")
    answers = await _ask_rest(settings)
    findings += find((rest,), answers)
    if not failed(findings):
        findings += [finding for answer in answers for finding in find((rest_table,), answer, of=answer.table)]
    if answers[-1].status is None:
        return findings + skip([realtime], "the project does not answer")
    return findings + await _look_at_realtime(settings)


# -- PostgREST ---------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """What PostgREST says to a read of a table: a status and why, or, without a status, why there is none."""

    table: str
    status: int | None
    told: str = ""


def rest(answers: Sequence[Answer]) -> Outcome:
    """It stands behind the same gateway as Realtime, and is quicker to say what is wrong with a key."""
    for answer in answers:
        if answer.status is None:
            return problem(
                f"SUPABASE_URL: the project does not answer ({answer.told}). Is it paused, or the address misspelt?"
            )
        if answer.status == httpx.codes.UNAUTHORIZED:
            return problem(
                f"SUPABASE_KEY: the project refuses this key ({answer.told}); take the present one ({_WHERE_KEYS_ARE})."
            )
        if answer.status >= httpx.codes.INTERNAL_SERVER_ERROR:
            return problem(f"The project's REST service is out of order (status {answer.status}).")
    return ok("The project's REST service answers to this key.")


def rest_table(answer: Answer) -> Outcome:
    """What the key may not read, Realtime does not send either."""
    if answer.status == httpx.codes.OK:
        return ok(f"The key reads {answer.table}.")
    found = f"The project's REST service does not show {answer.table} to this key ({answer.told})"
    schema, _, name = answer.table.partition(".")
    if answer.status == httpx.codes.FORBIDDEN:
        return problem(
            f"{found}, and Realtime sends no change of it either.",
            f"GRANT USAGE ON SCHEMA {quote(schema)} TO service_role; "
            f"GRANT SELECT ON {quote(schema)}.{quote(name)} TO service_role;",
        )
    if answer.status == httpx.codes.NOT_FOUND:
        return warning(f"{found}: there is no such table, or it is too new.", "NOTIFY pgrst, 'reload schema';")
    if answer.status == httpx.codes.NOT_ACCEPTABLE:
        return warning(f"{found}: {schema} is not among the exposed schemas in the project's API settings.")
    return warning(f"{found}.")


async def _ask_rest(settings: Settings) -> list[Answer]:
    """Read no row of each table, with the headers that the official clients send, as long as there are answers."""
    key = _key(settings)
    headers = {"apikey": key, "Authorization": f"Bearer {key}"}
    answers: list[Answer] = []
    async with httpx.AsyncClient(headers=headers, timeout=None) as client:  # noqa: S113 - `_ask` has a deadline
        for table in settings.tables:
            answers.append(await _ask(client, settings, table))
            if answers[-1].status is None:
                break
    return answers


async def _ask(client: httpx.AsyncClient, settings: Settings, table: str) -> Answer:
    schema, _, name = table.partition(".")
    url = f"{(settings.supabase_url or '').rstrip('/')}/rest/v1/{url_quote(name, safe='')}?limit=0"
    try:
        async with asyncio.timeout(_REST_SECONDS):
            answer = await client.get(url, headers=httpx.Headers({"Accept-Profile": schema}, encoding="utf-8"))
    except TimeoutError:
        return Answer(table, None, f"nothing came within {_REST_SECONDS:.0f} s")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Answer(table, None, str(error) or type(error).__name__)
    return Answer(table, answer.status_code, _told(answer).replace(_key(settings), "…"))


def _told(answer: httpx.Response) -> str:
    """The status, and the reason where PostgREST or the gateway gives one."""
    try:
        reason = answer.json()["message"]
    except (ValueError, LookupError, TypeError):
        return f"status {answer.status_code}"
    return f"status {answer.status_code}: {str(reason)[:200]}"


# -- Realtime ----------------------------------------------------------------------------------------------------------


async def _look_at_realtime(settings: Settings) -> list[Finding]:
    """Subscribe as the source does. A table that Realtime refuses spoils it for all: it is named, the rest is tried."""
    canary = settings.canary_table
    left = [*settings.tables, *([] if canary is None else [canary])]
    findings: list[Finding] = []
    while left:
        error = await _subscribe(settings, left)
        table = refused_table(str(error))
        if table not in left:
            return findings + find((realtime,), error)
        findings += find((subscribed if table != canary else canary_table,), table, of=table)
        left.remove(table)
    return findings + skip([realtime], "no table is left to subscribe to")


async def _subscribe(settings: Settings, tables: Sequence[str]) -> BridgeError | None:
    """Subscribe and leave again, and say what went wrong; takes as long as the project does, 15 s at most."""
    try:
        await make_source(settings.model_copy(update={"tables": tuple(tables)}), None).check()
    except (ConfigurationError, SourceError) as error:
        return error
    return None


def realtime(error: BridgeError | None) -> Outcome:
    """Only "Subscribed to PostgreSQL" means that changes flow; the reply to the join comes before, and says nothing."""
    if error is None:
        return ok("Supabase Realtime has subscribed to the tables.")
    if isinstance(error, ConfigurationError):
        return problem(f"{error}, or Realtime is switched off in its settings.")
    return problem(f"{error}. Is Realtime switched off in the project's settings?")


def refused_table(error: str) -> str:
    """The table that Realtime could not subscribe to, by its own words; empty if it is something else that it says."""
    found = _REFUSED_TABLE.search(error)
    return f"{found[1]}.{found[2]}" if found else ""


def subscribed(table: str) -> Outcome:
    """Realtime says the same of a table that is not there and of one that is not published."""
    schema, _, name = table.partition(".")
    return problem(
        f"Realtime cannot subscribe to {table}: it is not in the publication {SUPABASE_PUBLICATION}, or there is no "
        "such table. Until then no change of any table arrives.",
        f"ALTER PUBLICATION {quote(SUPABASE_PUBLICATION)} ADD TABLE {quote(schema)}.{quote(name)};",
    )


def canary_table(table: str) -> Outcome:
    """Until it is there, or BRIDGE_CANARY_TABLE is not set, `serve` does not begin to read."""
    schema, _, name = table.partition(".")
    quoted = f"{quote(schema)}.{quote(name)}"
    return problem(
        f"Realtime cannot subscribe to {table} (BRIDGE_CANARY_TABLE): it is not in the publication "
        f"{SUPABASE_PUBLICATION}, or there is no such table. Until then no change of any table arrives.",
        f"CREATE TABLE IF NOT EXISTS {quoted} (id text PRIMARY KEY, beat bigint NOT NULL); "
        f"ALTER TABLE {quoted} ENABLE ROW LEVEL SECURITY; "
        f"GRANT SELECT, INSERT, UPDATE ON {quoted} TO service_role; "
        f"ALTER PUBLICATION {quote(SUPABASE_PUBLICATION)} ADD TABLE {quoted};",
    )


# -- what is configured ------------------------------------------------------------------------------------------------


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
