"""Looks at everything that keeps changes from arriving, and says what mends it.

A check is a function from facts to an `Outcome`; its name is the finding's. To add one, write it next to its kin and
name it in the tuple at the end of their group:

    tokens.py     of Settings               what tokens are verified with
    server.py     of Facts                  Postgres, its slot and publication
    tables.py     of Facts and a Table …    tables, roles, and roles on tables
    evaluation.py of a Table and more       how policies are decided
    redis.py      of RedisFacts             the broker
    supabase.py   of Settings               the project of the `supabase` source

What it needs to know of Postgres is a column of a query in facts.py.

Layer: whole. May import: everything but cli and app.
"""

from realtime_bridge.checks.finding import Finding, failed
from realtime_bridge.checks.fixes import apply_fixes
from realtime_bridge.checks.postgres import look_at_postgres
from realtime_bridge.checks.redis import look_at_redis
from realtime_bridge.checks.supabase import look_at_supabase
from realtime_bridge.checks.tokens import look_at_tokens
from realtime_bridge.parts import make_source
from realtime_bridge.settings import Settings

__all__ = ["Finding", "apply_fixes", "failed", "run_checks"]


async def run_checks(settings: Settings) -> list[Finding]:
    """Run every check that applies. Changes nothing, takes some seconds, and may take a minute if nothing answers.

    Raises:
        ConfigurationError: the settings do not suffice to serve.
    """
    settings.require()
    source = make_source(settings, None)
    findings = [Finding("settings", "ok", "The settings are understood."), *await look_at_tokens(settings)]
    findings += await look_at_postgres(settings, source)
    if settings.source_kind == "supabase":
        findings += await look_at_supabase(settings)
    return findings + await look_at_redis(settings)
