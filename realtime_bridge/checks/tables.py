"""Checks of each table, of each role, and of each role on each table.

To add one: write a function of the same arguments as its neighbours and name it in the tuple.

Layer: whole. May import: checks.*.
"""

import re
from typing import Final

from realtime_bridge.checks.facts import Access, Facts, Role, Table, quote
from realtime_bridge.checks.finding import Outcome, ok, problem, softened, warning

_OWNER_COLUMNS: Final = ("user_id", "owner_id", "author_id", "profile_id", "created_by", "owner", "user")
_AUTH_FUNCTION: Final = re.compile(r"\bauth\.([a-z_]+)\s*\(\s*\)")
_GENERATED_COLUMNS_FROM: Final = 180_000
_STRUCTURED: Final = frozenset({"hstore", "geometry", "geography"})
"""Types of extensions that `to_jsonb` makes objects of, by a cast of their own."""

# -- a table -----------------------------------------------------------------------------------------------------------


def table(facts: Facts, about: Table) -> Outcome:
    """Only tables that are written to the WAL have changes."""
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
    """Messages are folded by it."""
    if about.key:
        return ok(f"Rows of {about.name} are told apart by {', '.join(about.key)}.")
    has_id = any(column.name == "id" for column in about.columns)
    add = "PRIMARY KEY (id)" if has_id else "COLUMN id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
    return problem(
        f"{about.name} has no primary key, so clients cannot tell which row a change is of.",
        f"ALTER TABLE {about.sql_name} ADD {add};",
    )


def replica_identity(facts: Facts, about: Table) -> Outcome:
    """Who could see a row before its change is decided from the old row."""
    targets = [about.sql_name] * (about.identity != "f") + list(about.partial_leaves)
    gap, widening = _gap(facts, about)
    if not targets and gap:
        default = f"ALTER TABLE {about.sql_name} REPLICA IDENTITY DEFAULT;" if about.key and about.kind == "r" else ""
        return problem(f"{about.name} is REPLICA IDENTITY FULL, and {gap}", widening or default)
    if not targets:
        return ok(f"Old rows of {about.name} come whole.")
    full = " ".join(f"ALTER TABLE {target} REPLICA IDENTITY FULL;" for target in targets)
    fix = f"{widening} {full}".lstrip() if widening or not gap else ""
    if about.identity == "n" or (about.identity == "d" and not about.key):
        return problem(f"{about.name} has no replica identity: once published, its rows cannot be updated.", fix)
    return warning(
        f"{about.name} is not REPLICA IDENTITY FULL, so changes do not tell what a row was. The bridge keeps an index "
        "of the table's rows for that; where a row is not in it, clients are sent a resync instead of its end."
        f"{f' It cannot be, since {gap}' if gap and not widening else ''}",
        fix,
    )


def _gap(facts: Facts, about: Table) -> tuple[str, str]:
    """Why Postgres refuses UPDATEs and DELETEs where old rows come whole, and the SQL that mends it, if there is any.

    Publications other than the configured one are somebody else's.
    """
    refused = "Postgres refuses every UPDATE and DELETE of such a table while"
    virtual = [column.name for column in about.columns if column.generated == "v"]
    if virtual:
        return f"{refused} it is published and has virtual generated columns ({', '.join(virtual)}).", ""
    if not about.narrow:
        return "", ""
    gap = f"{refused} a publication leaves out columns of it ({', '.join(about.narrow)})."
    if about.narrow != (facts.publication_name,):
        return gap, ""
    left_out = [column for column in about.columns if column.name not in (about.published_columns or ())]
    is_listed = not left_out or any(not column.generated for column in left_out)
    return gap, f"{with_generated(facts, about)}{publish_whole(facts, about) if is_listed else ''}".rstrip()


def published(facts: Facts, about: Table) -> Outcome | None:
    """The commonest reason why nothing arrives."""
    if facts.publication is None:
        return None
    if about.published:
        return ok(f"{about.name} is in the publication {facts.publication_name}.")
    mended = " `realtime-bridge check --fix` adds it." if facts.owned else ""
    return problem(
        f"{about.name} is not in the publication {facts.publication_name}, so none of its changes arrive.{mended}",
        publish(facts, about),
    )


def row_filter(facts: Facts, about: Table) -> Outcome | None:
    """A publication may send some rows only."""
    if about.row_filter is None:
        return None
    mended = " The bridge refuses to start; `realtime-bridge check --fix` takes the filter away." if facts.owned else ""
    return (problem if facts.owned else warning)(
        f"The publication {facts.publication_name} sends only those rows of {about.name} where {about.row_filter}; "
        f"changes of others never arrive.{mended}",
        publish_whole(facts, about),
    )


def columns(facts: Facts, about: Table) -> Outcome:
    """A publication may send some columns only, and none that are generated."""
    if about.published_columns is not None:
        hidden = [c.name for c in about.columns if not c.generated and c.name not in about.published_columns]
        if hidden:
            return warning(
                f"The publication {facts.publication_name} leaves out columns of {about.name} ({', '.join(hidden)}): "
                "they never arrive, and a policy that needs them shows nothing.",
                publish_whole(facts, about),
            )
    generated = [c.name for c in about.columns if c.generated and not _sent(facts, about, c.name)]
    if generated:
        return warning(
            f"Generated columns of {about.name} ({', '.join(generated)}) are in no change: they never arrive, and a "
            "policy that needs them shows nothing.",
            with_generated(facts, about).rstrip(),
        )
    return ok(f"All columns of {about.name} arrive.")


def column_types(facts: Facts, about: Table) -> Outcome | None:
    """What a client meets may surprise who knows PostgREST."""
    texts = [f"{c.name} ({c.type})" for c in about.columns if c.kind == "c" or c.type in _STRUCTURED]
    if not texts:
        return None
    return ok(f"Columns of {about.name} reach clients as Postgres writes them, in one string: {', '.join(texts)}.")


def row_level_security(facts: Facts, about: Table) -> Outcome:
    """Without it there is nothing to decide by, and unknown means no."""
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
    """A call of what does not exist denies everybody."""
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
    return ok(f"What decides about {about.name} finds auth.{'(), auth.'.join(sorted(used))}().")


def _sent(facts: Facts, about: Table, column: str) -> bool:
    newer = facts.server.version >= _GENERATED_COLUMNS_FROM
    return newer and about.published_columns is not None and column in about.published_columns


def with_generated(facts: Facts, *tables: Table) -> str:
    """The SQL by which a publication carries the generated columns of tables, with a space behind it; empty if it does.

    Without them Postgres refuses to update and delete rows of those that are REPLICA IDENTITY FULL.
    """
    publication = facts.publication
    if publication is None or publication.generated or not has_stored(facts, *tables):
        return ""
    return f"ALTER PUBLICATION {facts.sql_publication} SET (publish_generated_columns = stored); "


def has_stored(facts: Facts, *tables: Table) -> bool:
    """Whether tables have generated columns that this Postgres can publish."""
    newer = facts.server.version >= _GENERATED_COLUMNS_FROM
    return newer and any(column.generated == "s" for table in tables for column in table.columns)


def publish(facts: Facts, about: Table) -> str:
    """The SQL by which a publication carries a table that it has not."""
    return f"{with_generated(facts, about)}ALTER PUBLICATION {facts.sql_publication} ADD TABLE {about.sql_name};"


def publish_whole(facts: Facts, about: Table) -> str:
    """The SQL by which a publication carries every row and column of a table that it has in part."""
    alter = f"ALTER PUBLICATION {facts.sql_publication}"
    return f"{alter} DROP TABLE {about.sql_name}; {alter} ADD TABLE {about.sql_name};"


PUBLISHED_CHECKS: Final = (published, row_filter)


def repair_column(facts: Facts, about: Table) -> Outcome | None:
    """What Supabase Realtime did not tell is found by comparing rows."""
    if facts.owned:
        return None
    if any(column.name == facts.repair_column for column in about.columns):
        return ok(f"After a gap, changes of {about.name} are found by {facts.repair_column}, if a trigger sets it.")
    return warning(
        f"{about.name} has no column {facts.repair_column} (BRIDGE_REPAIR_COLUMN): after each gap of Realtime its "
        "readers have to read it again. docs/quickstart-supabase.md has the SQL for the column and its trigger."
    )


TABLE_CHECKS: Final = (
    primary_key,
    replica_identity,
    repair_column,
    columns,
    column_types,
    row_level_security,
    auth_functions,
)
"""Both of a table that exists: `table` comes first."""

# -- a role ------------------------------------------------------------------------------------------------------------


def role(facts: Facts, about: Role) -> Outcome:
    """It must be there for the taking; and whom no policy binds, sees all."""
    return _for(about.name, facts, _role(facts, about))


def _role(facts: Facts, about: Role) -> Outcome:
    name, login = quote(about.name), quote(facts.server.role)
    if not about.exists:
        return problem(
            f"BRIDGE_ROLES: there is no role {about.name}.",
            f"CREATE ROLE {name} NOLOGIN NOINHERIT; GRANT {name} TO {login};",
        )
    if not about.takeable:
        return problem(
            f"The login role {facts.server.role} may not take the role {about.name}, so nothing can be asked as it.",
            f"GRANT {name} TO {login};",
        )
    if about.exempt:
        return warning(
            f"BRIDGE_ROLES: no policy binds {about.name} ({about.exempt}): whoever has a token of that role sees "
            "every row."
        )
    owned = [table.name for table in facts.tables if (access := table.access.get(about.name)) and access.owner]
    if owned:
        return warning(
            f"BRIDGE_ROLES: {about.name} owns {', '.join(owned)}, whose policies do not bind it: it sees every row.",
            " ".join(
                f"ALTER TABLE {table.sql_name} FORCE ROW LEVEL SECURITY;"
                for table in facts.tables
                if table.name in owned
            ),
        )
    return ok(f"{about.name} is there, and policies bind it.")


ROLE_CHECKS: Final = (role,)

# -- a role on a table -------------------------------------------------------------------------------------------------


def policy(facts: Facts, about: Table, who: Role, access: Access) -> Outcome | None:
    """With row-level security and no policy, nobody sees anything."""
    if about.rule is not None or who.exempt or access.owner:
        return None
    if access.policies:
        return ok(f"{who.name} reads {about.name} by: {', '.join(access.policies)}.")
    return _for(
        who.name,
        facts,
        problem(
            f"No policy lets {who.name} read {about.name}, so it gets no change of it.", _owners_policy(about, who)
        ),
    )


def grant(facts: Facts, about: Table, who: Role, access: Access) -> Outcome:
    """Policies only narrow what is granted."""
    missing = []
    if not access.schema_usage:
        missing.append(f"GRANT USAGE ON SCHEMA {about.sql_schema} TO {quote(who.name)};")
    if not access.select:
        missing.append(f"GRANT SELECT ON {about.sql_name} TO {quote(who.name)};")
    if not missing:
        return ok(f"{who.name} may read {about.name}.")
    lacks = f"SELECT on the whole of {about.name}" if access.schema_usage else f"USAGE of the schema of {about.name}"
    return _for(who.name, facts, problem(f"{who.name} lacks {lacks}, so it gets no change of it.", " ".join(missing)))


ACCESS_CHECKS: Final = (policy, grant)


def may_see(about: Table, who: Role, access: Access) -> bool:
    """Whether anything is left to decide: grants and policies do not shut the role out beforehand."""
    if not (access.schema_usage and access.select):
        return False
    unbound = bool(who.exempt) or access.owner
    return about.rule is not None or (about.row_security and (unbound or bool(access.policies)))


def decision(facts: Facts, about: Table, who: Role, refusal: str | None) -> Outcome:
    """Whether this version can decide by the policies; runs where `may_see`.

    Args:
        facts: all of them.
        about: the table.
        who: the role.
        refusal: why the policy engine refuses, if it does.
    """
    if refusal is None:
        return ok(f"The bridge can decide which rows of {about.name} {who.name} sees.")
    policies = "; ".join(f"{name}: {text}" for name, text in about.policies.items() if about.rule is None)
    return problem(
        f"{refusal[:1].upper()}{refusal[1:]}. Write it another way, or give a rule in BRIDGE_POLICIES"
        f"{f' (now: {policies})' if policies else ''}."
    )


def _owners_policy(about: Table, who: Role) -> str:
    """The commonest policy, if the table has a column for it; `check` cannot know what else is meant."""
    uuids = {column.name for column in about.columns if column.type == "uuid"}
    owner = next((name for name in _OWNER_COLUMNS if name in uuids), None)
    if owner is None:
        return f"CREATE POLICY … ON {about.sql_name} FOR SELECT TO {quote(who.name)} USING (…)"
    return (
        f'CREATE POLICY "{who.name} reads its own" ON {about.sql_name} FOR SELECT TO {quote(who.name)} '
        f"USING ((SELECT auth.uid()) = {quote(owner)});"
    )


def _for(name: str, facts: Facts, outcome: Outcome) -> Outcome:
    """Shutting out who is not signed in is often meant: no problem as long as other roles may connect."""
    return softened(outcome) if name == "anon" and len(facts.roles) > 1 else outcome
