"""A random world, the same again for the same seed: users with their claims, what the database knows of them, and rows.

Values come from small pools, so that rows and users meet; the pools hold what programs trip over: NULL spelled as a
word, letters that grow when their case changes, what only Postgres reads as a uuid or a number, and claims of types
that no policy reckoned with.
"""

import json
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from realtime_bridge.claims import Claims
from tests.differential.policies import schema

ROLES: Final = ["anon", "authenticated", "service_role", "diff_editor", "diff_owner"]
USERS: Final = [str(uuid.UUID(int=0xABCDEF << 96 | i)) for i in range(16)]
ORGS: Final = range(1, 9)
PARENTS: Final = 8
"""Rows with a key below this may be referred to by others of their table."""
NULLS: Final = 0.12
"""The share of NULLs among values."""

LARGE: Final = "".join(random.Random(0).choices("0123456789abcdef", k=9000))
"""Kept out of line by Postgres, so that an update which leaves it alone does not bring it."""

KINDS: Final = ["a", "b", "x", "ß", "admin", "viewer", "None", "authenticated"]
TEXTS: Final = [
    *["a", "b"] * 4, "A", "aB", "", " ", "a ", " a", "None", "null", "NULL", "true", "ß", "ss", "SS", "ẞ", "İ", "i̇",
    "ǆ", "Ǆ", "é", "e\u0301", "it's", 'say "a"', "a\\b", "a%", "{a,b}", "{}", "(a)", "a,b", "NaN", "1e2", "007", "\t",
    "a\n", "😀", "\ufeffa", USERS[0], USERS[1].upper(), "long" * 500,
]  # fmt: skip
SHORT: Final = [text for text in TEXTS if len(text) <= 20]

POOLS: Final[Mapping[str, Sequence[str]]] = {
    "uuid": USERS,
    "bool": ["t", "f"],
    "int4": ["1", "2", "3", "0", "-3", "7", "2147483647", "-2147483648"],
    "int8": ["1", "2", "7", "99999999999", "9223372036854775807"],
    "text": TEXTS,
    "varchar": SHORT,
    "bpchar": ["a", "a ", "ab", "b", "ß", "", "abc"],
    "label": SHORT,
    "positive": ["1", "2", "7", "100"],
    "citext": SHORT,
    "ltree": ["a", "a.b", "a.b.c", "A.b", "x", ""],
    "mood": ["happy", "sad", "None"],
    "numeric": [
        "1", "1.0", "1.00", "1.5", "-0", "0.10", "NaN", "Infinity", "-Infinity", "1e2", "100", "99999999999999999999.5",
    ],
    "price": ["1", "1.005", "100", "NaN", "-0.001"],
    "float8": ["0.1", "0.30000000000000004", "NaN", "Infinity", "-0", "16777217", "1e308"],
    "float4": ["0.1", "16777216", "NaN", "2", "-Infinity", "3"],
    "timestamptz": [
        "2024-02-29 12:00:00.5+00", "2024-02-29 14:00:00.500+02", "infinity", "-infinity", "1970-01-01 00:00+00",
        "2999-12-31 00:00+00", "0044-03-15 BC",
    ],
    "timestamp": ["2024-02-29 12:00", "infinity", "-infinity", "0044-03-15 BC"],
    "date": ["2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "0044-03-14 BC", "0100-01-01 BC"],
    "interval": ["1 day", "24:00", "1 mon", "30 days", "-1 day"],
    "time": ["12:00", "12:00:00.5", "24:00", "00:00"],
    "bytea": ["\\x00ff", "\\x", "\\x61", "\\xc39f"],
    "inet": ["10.1.2.3", "10.0.0.0/8", "::1", "::1/64", "192.168.0.1"],
    "int4range": ["empty", "[1,5)", "(,3]", "[3,)", "[3,3]"],
    "place": ["(1,a)", "(2,ß)", "(,)", '(1,"a ")', '(,"say ""a"", (b)")'],
    "name": ["a", "b", "a ", "A"],
    "_uuid": [
        "{}", f"{{{USERS[0]}}}", f"{{NULL,{USERS[1]}}}", f"{{{','.join(USERS[2:6])}}}", "{NULL}",
        f"{{{{{USERS[7]}}},{{{USERS[8]}}}}}",
    ],
    "_text": [
        "{}", "{a}", "{b,c}", '{NULL,"a"}', '{"a,b","{}",""}', '{"it\'s","say \\"a\\"","a\\\\b"}', '{"NULL",ß}',
        '{" a","a "}', "[0:1]={a,b}",
    ],
    "_int4": ["{}", "{1,2}", "{2,3}", "{NULL,2}", "{3,4,5}"],
    "jsonb": [
        '{"kind": "a"}', '{"kind": null}', '{"kind": "b", "public": true}', '{"public": "true"}', "null", "[]", "7",
        '{"size": 1.00}', '"a"',
        '{"org": "ß"}', '{"org": 1e2}', '{"org": true}', '{"org": {"b": 1, "a": 2}}', '{"kind": "\\u0061"}',
        *[json.dumps({"acl": [user, "x"], "org": org}) for user, org in zip(USERS[:6], SHORT, strict=False)],
        json.dumps({"acl": {USERS[0]: True}}), json.dumps({"acl": USERS[1]}),
    ],
}  # fmt: skip
"""By type, as pg_type names it; a column's name goes before."""
BY_NAME: Final[Mapping[str, Sequence[str]]] = {
    "org_id": [str(org) for org in ORGS],
    "project_id": [str(project) for project in range(12)],
    "sub": [*USERS, USERS[2].upper(), "x"],
    "parent": [str(node) for node in range(PARENTS)],
    "kind": KINDS,
    "price": POOLS["price"],
    "body": [LARGE, LARGE[::-1], "a", "b"],
    "email": ["a@b.c", "A@b.c", "", "ß@b.c"],
}

MISSING: Final = object()
CLAIMS: Final[Mapping[str, Sequence[Any]]] = {
    "sub": [
        *USERS * 6, USERS[0].upper(), f"{{{USERS[1]}}}", USERS[2].replace("-", ""), USERS[3].title(), None, MISSING, "",
        "None", 7, "x", f" {USERS[4]}", [USERS[5]],
    ],
    "org": [*TEXTS, *["a", "b", "ß"] * 6, None, MISSING, 7, True, 1.5, 1e300, {"b": 1, "a": "a"}, ["a"], "{a,b}"],
    "level": [
        1, 2, "1", " 2 ", "+3", "007", "-3", 3, 7, 7, 1, "99999999999", 99999999999, None, MISSING, "x", 1.0, True, "",
    ],
    "admin": [*[True, False, "no", None, MISSING] * 4, "yes", "of", "T", " on ", "maybe", 1, "1", {}],
    "email": ["a@b.c", "A@b.c", "", None, MISSING, "ß@b.c", 7],
    "amount": ["1.0", 1, 1.5, "NaN", "Infinity", " 1.00 ", "1e2", 100, None, MISSING, "x", "0.1"],
    "feeling": [*["happy", "sad", "None", None, MISSING] * 3, "Happy", "", 7],
    "day": [*["2024-02-29", "infinity", "0044-03-15 BC", MISSING] * 3, "2024-02-30", "x", None, "20240229"],
    "app_metadata": [
        {"org": "a", "level": 1, "roles": ["editor"], "orgs": ["a", "b", None], "size": 7},
        {"org": "ß", "level": "2", "roles": ["viewer", "editor"], "orgs": ["ß", "a "], "size": "2"},
        {"org": None, "level": None, "roles": "editor", "orgs": [], "size": None},
        {"org": "a", "roles": {"editor": False}, "orgs": [1e2, True, {"a": 1}, "NaN"], "level": 7},
        {"org": "b", "level": 99999999999, "orgs": ["b"]},
        {"org": {"org": "a"}, "level": "x", "orgs": {"a": 1}, "size": -1},
        {"org": ["a"], "orgs": "a", "level": 1.5}, {}, "a", ["editor", "a"], None, MISSING, {"orgs": None, "size": 100},
    ],
    "session_id": ["s1", "s2"],
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table that is compared.

    Attributes:
        columns: name → type, of those that can be written.
        required: those that take no NULL.
    """

    name: str
    columns: Mapping[str, str]
    required: frozenset[str]


Row = dict[str, str | None]


class World:
    """Everything that is random, in the order in which it is asked for.

    Attributes:
        users: who might ask.
    """

    def __init__(self, seed: int, *, users: int = 60) -> None:
        self._chance = random.Random(seed)
        self.users = [self._claims() for _ in range(users)]

    def row(self, table: Table, key: int) -> Row:
        """A row's values, as text that Postgres reads."""
        return {"id": str(key)} | {name: self.value(table, name) for name in table.columns if name != "id"}

    def value(self, table: Table, column: str) -> str | None:
        """A value for a column, NULL among them."""
        if column not in table.required and self._chance.random() < NULLS:
            return None
        return self._chance.choice(BY_NAME.get(column) or POOLS[table.columns[column]])

    def edited(self, table: Table, row: Row) -> Row:
        """A row in which a few values are others."""
        names = [name for name in row if name != "id"]
        return row | {name: self.value(table, name) for name in self._chance.sample(names, min(2, len(names)))}

    def some(self, keys: Sequence[int], share: float) -> list[int]:
        """A part of the keys."""
        return sorted(self._chance.sample(keys, int(len(keys) * share)))

    def policies(self, tables: int) -> list[str]:
        """The statements that make so many tables, each under policies of its own."""
        return list(schema(self._chance, tables))

    def background(self) -> dict[str, list[tuple[Any, ...]]]:
        """What policies refer to: table → rows."""
        some = self._chance
        roles = ["admin", "owner", "viewer", "editor", "banned", "a", "b"]

        def org() -> int | None:
            return None if some.random() < NULLS else some.choice(ORGS)

        return {
            "app.profiles": [
                (user, org(), some.random() < 0.3, some.choice([*roles, "editor"]), some.choice([None, 1, 2, 3, 7]))
                for user in USERS[:-2]
            ],
            "app.members": [
                (user, member_of, some.choices(roles, [4, 2, 3, 2, 1, 2, 2])[0])
                for user in USERS[1:]
                for member_of in some.sample(ORGS, some.choice([0, 1, 1, 2, 4]))
            ],
            "app.bans": [(user, org()) for user in USERS[::2] for _ in range(some.choice([0, 1, 2]))],
            "app.projects": [(i, org(), some.choice([True, False, None])) for i in range(10)],
            "app.flags": [("beta", some.random() < 0.7), ("authenticated", True), ("anon", None)],
            "app.audit": [(org_id,) for org_id in ORGS],
            "app.plans": [(user, some.choice(["pro", "free"])) for user in USERS[:8]],
        }

    def _claims(self) -> Claims:
        role = self._chance.choices(ROLES, [10, 64, 6, 12, 8])[0]
        drawn = {name: self._chance.choice(pool) for name, pool in CLAIMS.items()}
        values = {name: value for name, value in drawn.items() if value is not MISSING} | {"role": role}
        if self._chance.random() < 1 / 60:
            values["nickname"] = "\0"  # which jsonb cannot hold: all that reads claims raises
        subject = values.get("sub")
        return Claims(values, role, subject if isinstance(subject, str) else None, None)
