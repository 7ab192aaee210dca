"""What `check --fix` mends: the publication and a lost slot, which are the bridge's own. Tables are the user's.

Layer: whole. May import: settings, errors, database, sources, checks.*.
"""

from realtime_bridge.checks.facts import read_slot
from realtime_bridge.checks.finding import Finding
from realtime_bridge.database import Database
from realtime_bridge.errors import BridgeError
from realtime_bridge.settings import Settings
from realtime_bridge.sources.postgres import ensure_publication


async def apply_fixes(settings: Settings) -> tuple[list[str], list[Finding]]:
    """Mend what is ours.

    Returns:
        The statements that were run, and a finding for each mending that failed.
    """
    if settings.source_kind != "postgres" or settings.database_url is None:
        return [], []
    dsn = settings.database_url.get_secret_value()
    done: list[str] = []
    failures: list[Finding] = []
    for mend in (_drop_lost_slot, _complete_publication):
        try:
            done += await mend(settings, dsn)
        except BridgeError as error:
            failures.append(Finding(f"fix {mend.__name__.lstrip('_')}", "problem", f"{str(error).rstrip('.')}."))
    return done, failures


async def _complete_publication(settings: Settings, dsn: str) -> list[str]:
    statements = await ensure_publication(dsn, settings.publication, settings.tables)
    return [f"{statement};" for statement in statements]


async def _drop_lost_slot(settings: Settings, dsn: str) -> list[str]:
    """`serve` then makes it anew, and tells the gap as one resync."""
    async with Database(dsn, max_size=1) as database, database.transaction() as connection:
        slot = await read_slot(connection, settings.slot)
        if slot is None or not slot.ours or slot.wal_status != "lost" or slot.holder is not None:
            return []
        await connection.execute("SELECT pg_drop_replication_slot($1)", settings.slot)
    return [f"SELECT pg_drop_replication_slot('{settings.slot}');"]
