"""Checks of the Postgres server, and of the slot and the publication that the `postgres` source reads.

To add one: write a function of `Facts` (or `Server`) and name it in the tuple.

Layer: whole. May import: checks.*.
"""

from typing import Final

from realtime_bridge.checks.clocks import clock_outcome
from realtime_bridge.checks.facts import OLDEST_VERSION, Facts, Server
from realtime_bridge.checks.finding import Outcome, ok, problem, warning
from realtime_bridge.checks.tables import has_stored

_MEBIBYTE: Final = 1 << 20
_MUCH_LAG: Final = 1 << 30


def postgres_version(server: Server) -> Outcome:
    """Older ones have no column lists, and other catalogs."""
    if not server.supported:
        return problem(f"Postgres is {server.version_text}; the bridge needs {OLDEST_VERSION} or later.")
    return ok(f"Postgres is {server.version_text}.")


def postgres_clock(offset: float) -> Outcome:
    """Postgres' clock dates the changes."""
    return clock_outcome("Postgres", offset)


def wal_level(facts: Facts) -> Outcome:
    """Anything less has no logical decoding."""
    level = facts.server.wal_level
    if level != "logical":
        return problem(
            f"wal_level is {level}, so Postgres writes no changes that could be read; set it and restart Postgres.",
            "ALTER SYSTEM SET wal_level = 'logical';",
        )
    return ok("wal_level is logical.")


def replication_slots(facts: Facts) -> Outcome:
    """Too late to find out when `serve` wants to make its own."""
    server = facts.server
    used = f"{server.slots_used} of {server.slots} replication slots exist"
    if facts.slot is None and server.slots_used >= server.slots:
        return problem(
            f"{used}, so none can be made for the bridge; drop one that nobody needs (they are in "
            "pg_replication_slots), or allow more and restart Postgres.",
            f"ALTER SYSTEM SET max_replication_slots = {server.slots + 5};",
        )
    return ok(f"{used}.")


def wal_senders(facts: Facts) -> Outcome:
    """Each reader of changes takes one."""
    server = facts.server
    used = f"{server.senders_used} of {server.senders} walsenders are busy"
    reading = facts.slot is not None and facts.slot.holder is not None
    if not reading and server.senders_used >= server.senders:
        return problem(
            f"{used}, so the bridge cannot read; stop a reader (they are in pg_stat_replication), or allow more "
            "and restart Postgres.",
            f"ALTER SYSTEM SET max_wal_senders = {server.senders + 5};",
        )
    return ok(f"{used}.")


def publication(facts: Facts) -> Outcome:
    """What is not published is not sent."""
    name, found = facts.sql_publication, facts.publication
    if found is None:
        tables = ", ".join(table.sql_name for table in facts.tables if table.exists)
        options = ["publish_via_partition_root = true"] if facts.owned else []
        options += ["publish_generated_columns = stored"] if has_stored(facts, *facts.tables) else []
        chosen = f" WITH ({', '.join(options)})" if options else ""
        return problem(
            f"There is no publication {facts.publication_name}, so no change is sent.{_by_fix(facts)}",
            f"CREATE PUBLICATION {name} FOR TABLE {tables}{chosen};" if tables else "",
        )
    if found.unpublished:
        return problem(
            f"The publication {facts.publication_name} leaves out every {' and '.join(found.unpublished)}."
            f"{_by_fix(facts)}",
            f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');",
        )
    return ok(f"The publication {facts.publication_name} sends every operation.")


def partitions(facts: Facts) -> Outcome | None:
    """Policies and subscriptions are of the whole table."""
    partitioned = [table.name for table in facts.tables if table.kind == "p"]
    if not partitioned or facts.publication is None:
        return None
    if not facts.publication.via_root:
        return problem(
            f"Changes of the partitioned {partitioned[0]} come under the names of its partitions, which nobody has "
            f"subscribed to.{_by_fix(facts)}",
            f"ALTER PUBLICATION {facts.sql_publication} SET (publish_via_partition_root = true);",
        )
    return ok("Changes of partitions come under the name of their table.")


def slot(facts: Facts) -> Outcome:
    """It may be lost, somebody else's, or in use."""
    name, found = facts.slot_name, facts.slot
    drop = f"SELECT pg_drop_replication_slot('{name}');"
    if found is None:
        return ok(f"There is no slot {name} yet; `serve` makes it.")
    if not found.ours:
        return problem(
            f"BRIDGE_SLOT: the slot {name} is somebody else's (plugin {found.plugin or 'none'}, "
            f"{'this' if found.here else 'another'} database); choose another name."
        )
    if found.wal_status == "lost":
        return problem(
            f"The slot {name} is lost: Postgres removed WAL that it needed, and what was committed meanwhile becomes "
            f"one resync.{_by_fix(facts)}",
            drop,
        )
    if found.holder is not None and not found.application.startswith(f"{facts.namespace}/"):
        return problem(f"The slot {name} is read by {found.holder}, so no bridge of this namespace can read it.")
    return ok(f"The slot {name} is read by {found.holder}." if found.holder else f"Nobody reads the slot {name} now.")


def slot_lag(facts: Facts) -> Outcome | None:
    """WAL is kept for it until somebody reads on."""
    found = facts.slot
    if found is None or not found.ours or found.wal_status == "lost":
        return None
    kept = f"Postgres keeps {found.lag_bytes / _MEBIBYTE:,.0f} MiB of WAL for the slot {facts.slot_name}"
    if found.wal_status == "unreserved":
        return warning(f"{kept}, which is over the limit: it can be lost at any moment; let a bridge read on soon.")
    if found.lag_bytes >= _MUCH_LAG:
        todo = "the reader is too slow" if found.holder else "start a bridge, or drop the slot if it is not needed"
        fix = "" if found.holder else f"SELECT pg_drop_replication_slot('{facts.slot_name}');"
        return warning(f"{kept}: {todo}.", fix)
    return ok(f"{kept}.")


def slot_limit(facts: Facts) -> Outcome:
    """Without one, a forgotten slot ends in a full disk."""
    limit = facts.server.slot_keep_megabytes
    if limit < 0:
        return warning(
            "max_slot_wal_keep_size is unlimited: while no bridge reads the slot, WAL fills the disk of Postgres.",
            "ALTER SYSTEM SET max_slot_wal_keep_size = '10GB'; SELECT pg_reload_conf();",
        )
    return ok(f"A slot keeps {limit} MiB of WAL at most.")


def _by_fix(facts: Facts) -> str:
    return " `realtime-bridge check --fix` mends it." if facts.owned else ""


SERVER_CHECKS: Final = (postgres_version,)
CLOCK_CHECKS: Final = (postgres_clock,)
SOURCE_CHECKS: Final = (wal_level, replication_slots, wal_senders, slot, slot_lag, slot_limit)
"""Of the `postgres` source alone."""
PUBLICATION_CHECKS: Final = (publication, partitions)
