"""Looks at Postgres: reads the facts, runs the checks of `server` and `tables` over them, and tries what can be tried.

Layer: whole. May import: settings, errors, claims, database, policy, sources, bridge, checks.*.
"""

import time
import uuid
from contextlib import AsyncExitStack
from typing import Final

from realtime_bridge.checks.evaluation import evaluation, followed
from realtime_bridge.checks.facts import (
    SUPABASE_PUBLICATION,
    Facts,
    Role,
    Server,
    Table,
    read_publication,
    read_roles,
    read_server,
    read_slot,
    read_tables,
)
from realtime_bridge.checks.finding import Finding, Outcome, failed, find, named, ok, problem, skip
from realtime_bridge.checks.server import CLOCK_CHECKS, PUBLICATION_CHECKS, SERVER_CHECKS, SOURCE_CHECKS
from realtime_bridge.checks.tables import (
    ACCESS_CHECKS,
    PUBLISHED_CHECKS,
    ROLE_CHECKS,
    TABLE_CHECKS,
    decision,
    may_see,
    table,
)
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.errors import BridgeError, ConfigurationError, SourceError
from realtime_bridge.parts import make_policy
from realtime_bridge.policy.asking import Asking
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.policy.explanation import decide_each
from realtime_bridge.settings import Settings
from realtime_bridge.sources.base import Source

_CONNECTIONS: Final = 2
_NO_ENGINE: Final = "the policies cannot be used"


async def look_at_postgres(settings: Settings, source: Source) -> list[Finding]:
    """Everything about the database, and about reading changes from it."""
    if settings.database_url is None:
        told = "DATABASE_URL is not set: BRIDGE_POLICIES alone decides who sees what."
        return [Finding("database", "skipped", told), named("policies", await _rules(settings))]
    async with AsyncExitStack() as stack:
        try:
            database = Database(settings.database_url.get_secret_value(), max_size=_CONNECTIONS)
            await stack.enter_async_context(database)
        except BridgeError as error:
            return _and_skipped([_unreachable(error)], settings, "the database cannot be reached")
        findings = [named("database", _reached(database))]
        try:
            async with database.transaction(readonly=True) as connection:
                server = await read_server(connection)
            findings += find(SERVER_CHECKS, server)
            if failed(findings):
                return _and_skipped(findings, settings, "this Postgres is too old")
            facts = await _read_facts(settings, database, server)
            findings += find(CLOCK_CHECKS, await database.clock_offset())
        except BridgeError as error:
            unread = Finding("facts", "problem", f"What Postgres knows of the tables cannot be read: {error}.")
            return _and_skipped([*findings, unread], settings, "Postgres could not be asked")
        findings += await _of_changes(settings, facts, source)
        findings += await _of_policies(settings, facts, database)
        return findings


def _unreachable(error: BridgeError) -> Finding:
    return Finding(
        "database", "problem", f"{str(error).rstrip('.')}.", "DATABASE_URL=postgresql://user:password@host:5432/db"
    )


def _reached(database: Database) -> Outcome:
    return ok("The database answers, through a pooler." if database.pooled else "The database answers.")


async def _read_facts(settings: Settings, database: Database, server: Server) -> Facts:
    owned = settings.source_kind == "postgres"
    publication = settings.publication if owned else SUPABASE_PUBLICATION
    async with database.transaction(readonly=True) as connection:
        return Facts(
            server=server,
            slot=await read_slot(connection, settings.slot),
            publication=await read_publication(connection, publication),
            roles=await read_roles(connection, settings.roles),
            tables=await read_tables(
                connection,
                settings.tables,
                roles=settings.roles,
                publication=publication,
                rules=settings.policies,
            ),
            publication_name=publication,
            slot_name=settings.slot,
            namespace=settings.namespace,
            fact_seconds=settings.fact_seconds,
            repair_column=settings.repair_column,
            owned=owned,
        )


# -- do changes come? --------------------------------------------------------------------------------------------------


async def _of_changes(settings: Settings, facts: Facts, source: Source) -> list[Finding]:
    findings = find(SOURCE_CHECKS, facts) if facts.owned else []
    findings += find(PUBLICATION_CHECKS, facts)
    of_rows: list[Finding] = []
    for about in facts.tables:
        present = find((table,), facts, about, of=about.name)
        findings += present
        if failed(present):
            because = f"{about.name} cannot be published"
            of_rows += skip((*PUBLISHED_CHECKS, *TABLE_CHECKS), because, of=about.name)
        else:
            findings += find(PUBLISHED_CHECKS, facts, about, of=about.name)
            of_rows += find(TABLE_CHECKS, facts, about, of=about.name)
    if not facts.owned:
        return findings + of_rows
    if failed(findings):
        return findings + of_rows + skip([replication], "other problems come first")
    return [*findings, *of_rows, named(replication.__name__, await replication(source))]


async def replication(source: Source) -> Outcome:
    """Whether the source finds all it needs: tries a replication connection, but begins nothing."""
    try:
        await source.check()
    except (ConfigurationError, SourceError) as error:
        return problem(f"{str(error).rstrip('.')}.")
    return ok("Postgres accepts a replication connection.")


# -- may anybody see them? ---------------------------------------------------------------------------------------------


async def _of_policies(settings: Settings, facts: Facts, database: Database) -> list[Finding]:
    findings = [finding for who in facts.roles for finding in find(ROLE_CHECKS, facts, who, of=who.name)]
    pairs = [(about, who) for about in facts.tables for who in facts.roles if about.exists and who.exists]
    for about, who in pairs:
        findings += find(ACCESS_CHECKS, facts, about, who, about.access[who.name], of=_pair(about, who))
    try:
        engine = make_policy(settings, database)
        await engine.prepare()
    except BridgeError as error:
        findings.append(Finding("policies", "problem", f"{str(error).rstrip('.')}."))
        findings += [skipped for about in facts.tables for skipped in skip([evaluation], _NO_ENGINE, of=about.name)]
        return findings + [skipped for pair in pairs for skipped in skip([decision], _NO_ENGINE, of=_pair(*pair))]
    findings += await _of_evaluation(settings, facts, database, engine)
    for about, who in pairs:
        if may_see(about, who, about.access[who.name]):
            findings += find(
                [decision], facts, about, who, engine.refusal(about.name, _claims(who)), of=_pair(about, who)
            )
        else:
            findings += skip([decision], f"{who.name} may not read {about.name}", of=_pair(about, who))
    return findings


async def _of_evaluation(settings: Settings, facts: Facts, database: Database, engine: PolicyEngine) -> list[Finding]:
    asking = Asking(database.transaction, settings.roles)
    follows = engine.knowledge.followed
    findings: list[Finding] = []
    for about in facts.tables:
        decided = engine.decision(about.name)
        if decided is not None:
            each = await decide_each(decided.table, about.rule, settings.roles, asking)
            findings += find([evaluation], facts, about, each, decided.table.references, follows, of=about.name)
    async with database.transaction(readonly=True) as connection:
        read = await read_tables(
            connection, sorted(engine.references), roles=(), publication=facts.publication_name, rules={}
        )
    return findings + [found for about in read for found in find([followed], facts, about, follows, of=about.name)]


async def _rules(settings: Settings) -> Outcome:
    """Whether BRIDGE_POLICIES can be used where there is no database to look at."""
    try:
        await make_policy(settings, None).prepare()
    except ConfigurationError as error:
        return problem(f"{str(error).rstrip('.')}.")
    return ok("BRIDGE_POLICIES is understood.")


def _pair(about: Table, who: Role) -> str:
    return f"{about.name} {who.name}"


def _claims(who: Role) -> Claims:
    """Somebody with a plain token of the role."""
    subject = None if who.name == "anon" else str(uuid.UUID(int=0))
    values = {"role": who.name} | ({"sub": subject, "aud": "authenticated"} if subject else {})
    return Claims(values, who.name, subject, time.time() + 60)


# -- what could not be looked at ---------------------------------------------------------------------------------------


def _and_skipped(found: list[Finding], settings: Settings, because: str) -> list[Finding]:
    """What was found, and every other check as skipped."""
    names = {finding.name for finding in found}
    return found + [skipped for skipped in _skipped(settings, because) if skipped.name not in names]


def _skipped(settings: Settings, because: str) -> list[Finding]:
    owned = settings.source_kind == "postgres"
    findings = skip([*SERVER_CHECKS, *CLOCK_CHECKS, *(SOURCE_CHECKS if owned else ()), *PUBLICATION_CHECKS], because)
    for name in settings.tables:
        findings += skip([table, *PUBLISHED_CHECKS, *TABLE_CHECKS, evaluation], because, of=name)
    findings += skip([replication] if owned else [], because)
    for role in settings.roles:
        findings += skip(ROLE_CHECKS, because, of=role)
    pairs = [f"{name} {role}" for name in settings.tables for role in settings.roles]
    return findings + [skipped for of in pairs for skipped in skip([*ACCESS_CHECKS, decision], because, of=of)]
