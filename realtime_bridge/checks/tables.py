"""Checks of each table, of each role, and of each role on each table.

To add one: write a function of the same arguments as its neighbours and name it in the tuple.

Layer: whole. May import: values, checks.*.
"""

import re
from typing import Final

from realtime_bridge.checks.facts import Access, Facts, Role, Table, quote
from realtime_bridge.checks.finding import Outcome, ok, problem, softened, warning
from realtime_bridge.values import encoder_of

_OWNER_COLUMNS: Final = ("user_id", "owner_id", "author_id", "profile_id", "created_by", "owner", "user")
_AUTH_FUNCTION: Final = re.compile(r"\bauth\.([a-z_]+)\s*\(\s*\)")
_GENERATED_COLUMNS_FROM: Final = 180_000
_WRITTEN_AS_TEXT: Final = {"b": frozenset({"hstore", "geometry", "geography", "vector"}), "c": None}

# -- a table -----------------------------------------------------------------------------------------------------------


def table(facts: Facts, about: Table) -> Outcome:
    if about.kind is None:
        return problem(f"BRIDGE_TABLES: there is no table {about.name}.")
    if not about.exists:
        return problem(f"BRIDGE_TABLES: {about.name} is not a table, so Postgres publishes no changes of it.")
    if about.persistence != "p":
        return problem(
            f"{about.name} is unlogged or temporary, so Postgres publishes no changes of it.",
            f"ALTER TABLE {about.sql_name} SET LOGGED;",
        )
    return ok(f"{about.name} is there.")


def primary_key(facts: Facts, about: Table) -> Outcome:
    if about.key:
        return ok(f"Rows of {about.name} are told apart by {', '.join(about.key)}.")
    has_id = any(column.name == "id" for column in about.columns)
    add = "PRIMARY KEY (id)" if has_id else "COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
    return problem(
        f"{about.name} has no primary key, so clients cannot tell which row a change is of.",
        f"ALTER TABLE {about.sql_name} ADD {add};",
    )


def replica_identity(facts: Facts, about: Table) -> Outcome:
    targets = [about.sql_name] * (about.identity != "f") + list(about.partial_leaves)
    if not targets:
        return ok(f"Old rows of {about.name} come whole.")
    fix = " ".join(f"ALTER TABLE {target} REPLICA IDENTITY FULL;" for target in targets)
    if about.identity == "n" or (about.identity == "d" and not about.key):
        return problem(f"{about.name} has no replica identity: once published, its rows cannot be updated.", fix)
    return warning(
        f"{about.name} is not REPLICA IDENTITY FULL: changes do not tell what a row was, so for a DELETE, or a row that "
        "leaves what a user may see, that user is sent a resync instead of the change.",
        fix,
    )


def published(facts: Facts, about: Table) -> Outcome:
    if about.published:
        return ok(f"{about.name} is in the publication {facts.publication_name}.")
    mended = " `realtime-bridge check --fix` adds it." if facts.owned else ""
    return problem(
        f"{about.name} is not in the publication {facts.publication_name}, so none of its changes arrive.{mended}",
        f"ALTER PUBLICATION {facts.sql_publication} ADD TABLE {about.sql_name};",
    )


def row_filter(facts: Facts, about: Table) -> Outcome | None:
    if about.row_filter is None:
        return None
    return warning(
        f"The publication {facts.publication_name} sends only those rows of {about.name} where {about.row_filter}; "
        "changes of others never arrive.",
        _publish_whole(facts, about),
    )


def columns(facts: Facts, about: Table) -> Outcome:
    if about.published_columns is not None:
        hidden = [c.name for c in about.columns if not c.generated and c.name not in about.published_columns]
        if hidden:
            return warning(
                f"The publication {facts.publication_name} leaves out columns of {about.name} ({', '.join(hidden)}): "
                "they never arrive, and a policy that needs them shows nothing.",
                _publish_whole(facts, about),
            )
    generated = [c.name for c in about.columns if c.generated and not _sent(facts, about, c.name)]
    if generated:
        return warning(
            f"Generated columns of {about.name} ({', '.join(generated)}) are in no change: they never arrive, and a "
            "policy that needs them shows nothing."
        )
    return ok(f"All columns of {about.name} arrive.")


def column_types(facts: Facts, about: Table) -> Outcome | None:
    texts = [f"{column.name} ({column.type.removeprefix('_')})" for column in about.columns if _is_structured(column)]
    if not texts:
        return None
    return ok(f"Columns of {about.name} reach clients as Postgres writes them, in one string: {', '.join(texts)}.")


def row_level_security(facts: Facts, about: Table) -> Outcome:
    if about.rule is not None:
        return ok(f"BRIDGE_POLICIES decides who sees {about.name}.")
    if about.row_security:
        return ok(f"Row-level security of {about.name} is enabled.")
    return problem(
        f"{about.name} has no row-level security, and without it nothing is delivered; enable it, or give a rule in "
        "BRIDGE_POLICIES.",
        f"ALTER TABLE {about.sql_name} ENABLE ROW LEVEL SECURITY;",
    )


def auth_functions(facts: Facts, about: Table) -> Outcome | None:
    texts = [about.rule] if about.rule is not None else about.policies.values()
    used = {name for text in texts for name in _AUTH_FUNCTION.findall(text)}
    if not used:
        return None
    missing = sorted(used - set(facts.server.auth_functions))
    if missing:
        return problem(
            f"What decides about {about.name} calls auth.{missing[0]}(), which does not exist; Supabase has it, "
            "elsewhere it has to be made."
        )
    return ok(f"auth.{'(), auth.'.join(sorted(used))}() are there.")


def _sent(facts: Facts, about: Table, column: str) -> bool:
    newer = facts.server.version >= _GENERATED_COLUMNS_FROM
    return newer and about.published_columns is not None and column in about.published_columns


def _publish_whole(facts: Facts, about: Table) -> str:
    alter = f"ALTER PUBLICATION {facts.sql_publication}"
    return f"{alter} DROP TABLE {about.sql_name}; {alter} ADD TABLE {about.sql_name};"
