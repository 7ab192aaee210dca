"""Random policies: what the schema's hand-written ones say, put together in ways that nobody would think of."""

import random
from collections.abc import Iterator
from typing import Final

COLUMNS: Final = (
    "id int primary key, owner uuid, org_id int, project_id int, kind text, level int, is_public bool, deleted bool, "
    "readers uuid[], tags text[], amount numeric, at timestamptz"
)

LEAVES: Final = [
    # of the row and the user (without private functions: beside a sub-select under row security, in a condition that
    # has to be asked as a whole, Postgres resolves their names again under a role that may not use their schema)
    "owner = auth.uid()",
    "owner = (select auth.uid())",
    "owner <> auth.uid()",
    "owner is not distinct from auth.uid()",
    "auth.uid() = any (readers)",
    "kind = (auth.jwt() ->> 'org')",
    "(auth.jwt() ->> 'org') = any (tags)",
    "level = (auth.jwt() -> 'app_metadata' ->> 'size')::int",
    "level <= (select p.level from app.profiles p where p.id = auth.uid())",
    "org_id = app.my_company()",
    "org_id in (select app.my_orgs())",
    "org_id = any (app.my_org_array())",
    "org_id in (select m.org_id from app.members m where m.user_id = auth.uid())",
    "org_id not in (select b.org_id from app.bans b where b.user_id = auth.uid())",
    "exists (select from app.members m where m.org_id = {table}.org_id and m.user_id = auth.uid() and m.role <> 'b')",
    "exists (select from app.members m where m.org_id = {table}.org_id and m.role = {table}.kind)",
    "exists (select from app.projects p where p.id = {table}.project_id)",
    "app.is_member(org_id)",
    "app.can_edit(org_id, kind)",
    # of the user
    "app.is_admin()",
    "app.has_role('editor')",
    "exists (select from app.profiles p where p.id = auth.uid() and p.is_admin)",
    "auth.role() = 'authenticated'",
    "auth.uid() is not null",
    "(auth.jwt() -> 'app_metadata' -> 'roles') ? 'editor'",
    # of the row
    "is_public",
    "deleted",
    "deleted is not true",
    "kind in ('a', 'ß', 'None')",
    "kind not in ('a', null)",
    "kind < 'b'",
    "lower(kind) = 'a'",
    "level > 1",
    "level is null",
    "level between 1 and 3",
    "amount = 1.0",
    "amount < 'NaN'",
    "at > now()",
    "tags @> array['a']",
    "coalesce(is_public, deleted, true)",
    "true",
    "null::bool",
]


def schema(chance: random.Random, tables: int) -> Iterator[str]:
    """The statements that make so many tables under random policies."""
    for number in range(tables):
        name = f"random_{number}"
        yield f"create table {name} ({COLUMNS})"
        for policy in range(chance.choice([1, 1, 2, 3])):
            kind = "restrictive" if policy and chance.random() < 0.4 else "permissive"
            roles = chance.choice(["public", "public", "public", "authenticated", "anon, diff_editor"])
            condition = expression(chance, chance.choice([1, 2, 2, 3])).format(table=name)
            yield f"create policy p{policy} on {name} as {kind} for select to {roles} using ({condition})"


def expression(chance: random.Random, depth: int) -> str:
    """A condition over `COLUMNS`; `{table}` stands for its name."""
    if depth == 0:
        return chance.choice(LEAVES)
    one, two, three = (expression(chance, depth - 1) for _ in range(3))
    forms = {
        f"({one}) and ({two})": 6,
        f"({one}) or ({two})": 6,
        f"({one}) or ({two}) or ({three})": 3,
        f"not ({one})": 3,
        f"({one}) is true": 1,
        f"({one}) is not false": 1,
        f"({one}) is unknown": 1,
        f"coalesce({one}, {two})": 1,
        f"case when {one} then {two} else {three} end": 1,
    }
    return chance.choices(list(forms), list(forms.values()))[0]
