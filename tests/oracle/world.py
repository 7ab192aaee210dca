"""The oracle's tables and users, and who may see what: the policies once more, in Python.

Every kind of policy is there: own rows and public ones (`posts`), membership through a second table (`documents`), a
function that nobody can look into and one that reads the second table (`reports`), and that second table itself
(`members`), which is served and referred to.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.services import token

Row = dict[str, Any]
Key = tuple[Any, ...]
Tables = dict[str, dict[Key, Row]]

KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "public.posts": ("id",),
    "public.documents": ("id",),
    "public.reports": ("id",),
    "public.members": ("user_id", "team"),
}
"""Table → its primary key."""
TEAMS: Final = range(4)
TRANSACTION_ROWS: Final = 25
"""A transaction of more rows is told as `bulk`."""

_TEAMS_OF_USER: Final = "select m.team from members m where m.user_id = auth.uid()"
POLICIES: Final = (
    f"team in ({_TEAMS_OF_USER})",
    f"team in ({_TEAMS_OF_USER}) or is_open",
    f"(author = auth.uid() or team in ({_TEAMS_OF_USER})) and not is_open",
)
"""Those that `documents` has, one at a time."""
ALTERED: Final = "public.documents"
"""The table whose policy is altered."""
SCHEMA: Final = f"""
    create table members (user_id uuid, team int, primary key (user_id, team));
    create policy own on members for select using (user_id = auth.uid());

    create table documents (id int primary key, team int, author uuid, is_open bool not null, title text, tags text[]);
    create policy team on documents for select using ({POLICIES[0]});

    create function cleared(wanted int) returns bool language plpgsql stable set search_path = '' as
      $$ begin return (auth.jwt() ->> 'clearance')::int >= wanted; end $$;
    create function member_of(wanted int) returns bool language sql stable security definer set search_path = '' as
      $$ select exists (select from public.members m where m.team = wanted and m.user_id = auth.uid()) $$;
    create table reports (id text primary key, team int, level int, amount numeric, payload jsonb);
    create policy staff on reports for select using (cleared(level) or member_of(team));

    alter table members replica identity full, enable row level security;
    alter table documents replica identity full, enable row level security;
    alter table reports replica identity full, enable row level security;
    grant select on members, documents, reports to authenticated;
"""


@dataclass(frozen=True)
class User:
    """Somebody with a token; without an id somebody who has not signed in."""

    name: str
    id: str | None
    clearance: int = 0

    @property
    def role(self) -> str:
        return "anon" if self.id is None else "authenticated"

    @property
    def tables(self) -> tuple[str, ...]:
        return ("public.posts",) if self.id is None else tuple(KEYS)

    @property
    def claims(self) -> Mapping[str, Any]:
        own = {} if self.id is None else {"sub": self.id}
        return {**own, "role": self.role, "clearance": self.clearance}

    @property
    def token(self) -> str:
        return token(self.id, self.role, clearance=self.clearance)


USERS: Final = (
    *(User(name, f"{i:08x}-0000-4000-8000-000000000000", i % 4) for i, name in enumerate("abcdefghij", start=1)),
    User("nobody", None),
)


@dataclass(frozen=True)
class Facts:
    """What the policies rest on besides the row.

    Attributes:
        teams: user's id → the teams that the user is a member of.
        policy: which of `POLICIES` is that of `documents`.
    """

    teams: Mapping[str, frozenset[int]]
    policy: int

    def teams_of(self, user: User) -> frozenset[int]:
        return self.teams.get(user.id, frozenset()) if user.id is not None else frozenset()

    def about(self, user: User, table: str) -> object:
        """What decides, besides the row, whether a user sees a row of a table."""
        if table == "public.documents":
            return self.policy, self.teams_of(user)
        return self.teams_of(user) if table == "public.reports" else None

    def show(self, user: User, table: str, row: Row | None) -> bool:
        """Whether a user may see a row."""
        if row is None:
            return False
        match table:
            case "public.posts":
                return bool(row["user_id"] == user.id or row["is_public"])
            case "public.members":
                return bool(row["user_id"] == user.id)
            case "public.reports":
                return row["level"] <= user.clearance or row["team"] in self.teams_of(user)
        is_of_team = row["team"] in self.teams_of(user)
        return (
            is_of_team,
            is_of_team or row["is_open"],
            (row["author"] == user.id or is_of_team) and not row["is_open"],
        )[self.policy]


def key_of(table: str, row: Row) -> Key:
    return tuple(row[column] for column in KEYS[table])


def facts_of(members: Mapping[Key, Row], policy: int) -> Facts:
    """The facts where these are the rows of `members`."""
    teams: dict[str, set[int]] = {}
    for row in members.values():
        teams.setdefault(row["user_id"], set()).add(row["team"])
    return Facts({user: frozenset(own) for user, own in teams.items()}, policy)
