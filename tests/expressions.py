"""Expressions, rows and users to compare with Postgres: `tests.worlds` does that."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

ANN, BOB, CAT = (f"{letter}0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11" for letter in "abc")
ACME, BYTE, CORP = (f"{letter}1111111-9c0b-4ef8-bb6d-6bb9bd380a11" for letter in "def")

SCHEMA: Final = """
create type public.mood as enum ('happy', 'sad', 'None');
create type public.pair as (x int, y int);
create domain public.rank as int check (value > -100);
create domain public.flag as boolean;
do $$ begin
  create collation public.folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
exception when feature_not_supported then  -- built without ICU, and so without any such collation
  create collation public.folded from "C";
end $$;

create schema extensions;
create function extensions.same_folded(text, text) returns boolean language sql immutable
  return lower($1) = lower($2);
create operator extensions.= (leftarg = text, rightarg = text, function = extensions.same_folded);

create table public.things (
  id bigint generated always as identity primary key,
  a boolean, b boolean, f public.flag, n int, m bigint, s smallint, k public.rank,
  price numeric, rate numeric(10, 2), owner uuid, other uuid, org uuid, kind text, name text, short varchar(12),
  mood public.mood, at timestamptz, made timestamp, day date, clock time, raw bytea, code char(4), x double precision,
  data jsonb, tags text[], people uuid[], nums int[], moods public.mood[], word text collate public.folded,
  place public.pair
);

create table public.members (
  org uuid, user_id uuid, kind text, word text collate public.folded, at timestamptz,
  constraint members_pk unique (org, user_id, kind)
);
create table public.orgs (id uuid primary key, boss uuid, is_open boolean);
create table public.profiles (user_id uuid primary key, org uuid, is_admin boolean, level numeric, name text);
alter table public.members enable row level security;
create policy own on public.members for select using (kind is distinct from 'hidden');
grant usage on schema extensions to anon, authenticated;
grant select on all tables in schema public to anon, authenticated;

create function public.is_admin() returns boolean language sql stable security definer set search_path = ''
  return (select p.is_admin from public.profiles p where p.user_id = auth.uid());
create function public.my_orgs() returns setof uuid language sql stable security definer set search_path = ''
  return (select m.org from public.members m where m.user_id = auth.uid() limit 1);
create function public.my_org_array() returns uuid[] language sql stable security definer set search_path = ''
  return (select array_agg(m.org) from public.members m where m.user_id = auth.uid());
create function public.is_member(org uuid) returns boolean language sql stable security definer set search_path = ''
  return (select bool_or(true) from public.members m where m.org = $1 and m.user_id = auth.uid());
"""

_TEXTS = [
    "",
    "a",
    "A",
    "None",
    "null",
    "NULL",
    "ß",
    "SS",
    "ẞ",
    "İ",
    "i",
    "ǆ",
    "it's",
    '"{a,b}"',
    "{a,b}",
    "a,b",
    "\\",
    "ä",
]
_TIMES = ["2026-01-01 00:00:00", "2026-01-01 00:00:00.000001", "2025-12-31 23:59:59.5", "0044-03-15 12:00:00 BC"]
_TIMES += ["infinity", "-infinity", "12026-01-01 00:00:00", "0043-03-15 12:00:00 BC"]

VALUES: Final[Mapping[str, Sequence[object]]] = {
    "a": [True, False],
    "b": [True, False],
    "f": [True, False],
    "n": [0, 1, -1, 5, 2147483647],
    "m": [0, 1, 5, -9223372036854775808, 2147483648],
    "s": [0, 1, 5],
    "k": [0, 1, -5],
    "price": [
        "1",
        "1.0",
        "1.00",
        "-0.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "99999999999999999999.000000001",
        "0.00",
        "5",
    ],
    "rate": ["1", "1.25", "-1", "NaN"],
    "owner": [ANN, BOB, CAT],
    "other": [ANN, BOB, CAT],
    "org": [ACME, BYTE, CORP],
    "kind": ["staff", "guest", "hidden", "A", "a"],
    "name": _TEXTS,
    "short": ["a", "A", "None", "it's", "ß"],
    "mood": ["happy", "sad", "None"],
    "at": [f"{time}+00".replace(" BC+00", "+00 BC").replace("infinity+00", "infinity") for time in _TIMES],
    "made": _TIMES,
    "day": ["2026-01-01", "2025-12-31", "infinity", "-infinity", "0044-03-15 BC", "0043-01-01 BC", "2024-02-29"],
    "clock": ["00:00:00", "24:00:00", "12:00:00.5", "12:00:00.500001"],
    "raw": ["\\x", "\\xdead", "\\xDEAD", "\\x00"],
    "code": ["a", "a ", "ab"],
    "x": ["1", "1.5", "NaN", "9007199254740993", "-0"],
    "data": [f'{{"owner": "{ANN}"}}', '{"n": 1.50}', '{"n": 1.5}', "1", "1.0", '"a"', "null", '{"owner": null}'],
    "tags": [["a"], [], ["a", None], ["None", "a,b", '"', "\\", "{", " "], [None], ["ß", ""]],
    "people": [[ANN], [ANN, BOB], [], [None], [CAT, None]],
    "nums": [[1, 2], [[1, 2], [3, 5]], [], [None, 5]],
    "moods": [["happy"], ["sad", "None"], []],
    "word": ["a", "A", "ä", "b"],
    "place": ["(1,2)", "(,)", "(1,)"],
}

EXPRESSIONS: Final = [
    # the row alone
    "a",
    "not a",
    "f and not b",
    "a or not b",
    "(a or b) and not (a and b)",
    "a is not true and b is not false",
    "(a and b) is null",
    "coalesce(a, false)",
    "coalesce(n = 1, true)",
    "coalesce(a, b, false)",
    "n = 1",
    "n <> 1 or m = 5",
    "n in (0, 1, null)",
    "n not in (0, null)",
    "n not in (0, 1)",
    "n < m",
    "n <= 1",
    "n > s",
    "n >= 5 and n < 2147483648",
    "n between 0 and 1",
    "n not between 0 and m",
    "k = -5",
    "k > 0",
    "price = 1",
    "price = 1.00 or price = 'NaN'",
    "price = rate",
    "price <> n",
    "price < 'NaN'",
    "price >= 'Infinity'",
    "rate < price",
    "n < price",
    "price = 99999999999999999999.000000001",
    "rate in (1, 1.250)",
    "owner = other",
    f"owner = '{ANN.upper()}'",
    f"owner = '{{{ANN}}}' or owner is null",
    "owner is distinct from other",
    "name is not distinct from short",
    "name = 'None'",
    "name <> 'it''s'",
    "name in ('ß', 'SS', 'İ')",
    "name = short",
    "short::text = name",
    "mood = 'None'",
    "mood <> 'happy'",
    "mood in ('happy', 'sad')",
    "mood::text = name",
    "at = '2026-01-01 00:00:00+00'",
    "at < '2026-01-01 01:00:00+01'",
    "at > '0044-06-01 00:00:00+00 BC'",
    "at <= 'infinity'",
    "made >= '2026-01-01 00:00:00.000001'",
    "made = '0044-03-15 12:00:00 BC'",
    "day <= '2026-01-01'",
    "day > '-infinity' and day < '0043-06-01 BC'",
    "day < made",
    "made < at",
    "clock = '24:00:00'",
    "clock = '12:00:00.50'",
    "raw = '\\xdead'",
    "raw <> '\\xDEAD'",
    "at is null or place is null",
    "place is not null",
    "data is null",
    "'a' = any (tags)",
    "'None' <> all (tags)",
    "'a,b' = any (tags) or '\\' = any (tags)",
    "name = any (tags)",
    "n = any (nums)",
    "5 <> all (nums)",
    "'happy' = any (moods)",
    "owner = any (people)",
    # the row alone, by Postgres
    "code = 'a'",
    "x = 1",
    "x = '0'",
    "x < 1.5 or x = 'NaN'",
    "word = 'A'",
    "word in ('B', 'ä')",
    "lower(name) = 'ss'",
    "name < 'b'",
    "name like '%a%'",
    "data ->> 'n' = '1.50'",
    "data = '1'",
    "data @> '{\"n\": 1.5}'",
    "name operator(extensions.=) short",
    "case when a then n = 1 else b end",
    "n::bigint + 1 = m",
    "not (lower(name) = 'a' or a)",
    # the user alone
    "auth.uid() is not null",
    "(select auth.role()) = 'authenticated'",
    "auth.jwt() ->> 'org' is null",
    "public.is_admin()",
    "not public.is_admin()",
    "exists (select 1 from public.profiles p where p.user_id = auth.uid() and p.is_admin)",
    "(auth.jwt() -> 'orgs') ? 'x' or a",
    "current_user = 'anon'",
    # the row and the user
    "owner = auth.uid()",
    "owner <> (select auth.uid())",
    "auth.uid() in (owner, other)",
    "owner = (auth.jwt() ->> 'sub')::uuid",
    "name = auth.jwt() ->> 'name'",
    "name is distinct from auth.email()",
    "n = (auth.jwt() ->> 'level')::int",
    "n <= (auth.jwt() ->> 'level')::int",
    "price < (auth.jwt() ->> 'level')::numeric",
    "mood = (auth.jwt() ->> 'mood')::public.mood",
    "at < (auth.jwt() ->> 'since')::timestamptz",
    "auth.uid() = any (people)",
    "auth.uid() <> all (people)",
    "auth.jwt() ->> 'name' = any (tags)",
    "n = any (string_to_array(auth.jwt() ->> 'numbers', ',')::int[])",
    "word = auth.jwt() ->> 'name'",
    "data ->> 'owner' = auth.uid()::text",
    "org = (select p.org from public.profiles p where p.user_id = auth.uid())",
    "price <= (select p.level from public.profiles p where p.user_id = auth.uid())",
    "name = (select p.name from public.profiles p where p.user_id = auth.uid())",
    "org in (select m.org from public.members m where m.user_id = auth.uid())",
    "org not in (select m.org from public.members m where m.user_id = auth.uid())",
    "kind in (select m.kind from public.members m where m.user_id = auth.uid())",
    "name in (select m.word from public.members m)",
    "org in (select public.my_orgs())",
    "org = any (public.my_org_array())",
    "org <> all (public.my_org_array())",
    "org = any (array(select m.org from public.members m where m.kind = 'staff'))",
    "exists (select 1 from public.members m where m.org = things.org and m.user_id = (select auth.uid()))",
    "not exists (select m.* from public.members m where things.org = m.org and m.user_id = auth.uid())",
    "exists (select 1 from public.members m join public.orgs o on o.id = m.org"
    " where o.id = things.org and m.user_id = auth.uid() and o.is_open)",
    "exists (select 1 from public.orgs o where o.id = things.org and o.is_open)",
    "exists (select 1 from public.orgs o where o.boss = auth.uid() and o.id = things.org) or a",
    "auth.uid() in (select m.user_id from public.members m where m.org = things.org)",
    "not (auth.uid() in (select m.user_id from public.members m where m.org = things.org))",
    "auth.uid() in (select o.boss from public.orgs o where o.id = things.org)",
    "not (auth.uid() in (select o.boss from public.orgs o where o.id = things.org))",
    "exists (select 1 from public.members m where m.org = things.org and m.kind = things.kind)",
    "exists (select 1 from public.members m where m.kind = things.kind group by m.org having count(*) > 1)",
    "exists (select count(*) from public.members m where m.org = things.org)",
    "exists (select 1 from public.members m where m.org = things.org offset 1)",
    "exists (select 1 from public.members m where m.word = things.name)",
    'exists (select 1 from public.members m where m.kind = things.kind collate "C" and m.user_id = auth.uid())',
    "org in (select m.org from public.members m where m.kind = things.kind)",
    "public.is_member(org)",
    "public.is_member(org) is not true and n > 0",
    "coalesce(public.is_member(org), a)",
    "(a and public.is_member(org)) or owner = auth.uid()",
    "a or public.is_member(org) or org in (select m.org from public.members m where m.user_id = auth.uid())",
    "owner = auth.uid() and (n = 1 or price < 5) and not b",
]

USERS: Final[Sequence[Mapping[str, Any]]] = [
    {"sub": ANN, "role": "authenticated", "name": "None", "org": ACME, "level": 1, "mood": "sad", "numbers": "1,5"},
    {"sub": BOB.upper(), "role": "authenticated", "name": "A", "level": "5", "since": "2026-01-01T02:00:00+02:00"},
    {"sub": CAT, "role": "authenticated", "email": "it's", "name": None, "orgs": ["x"], "numbers": ""},
    {"role": "anon", "name": "ß", "level": "0", "since": "infinity"},
]

DATA: Final = f"""
insert into public.orgs values ('{ACME}', '{ANN}', true), ('{BYTE}', null, false), ('{CORP}', '{CAT}', null);
insert into public.profiles values
  ('{ANN}', '{ACME}', true, 1.50, 'a'), ('{BOB}', '{BYTE}', false, 'NaN', 'ß'), ('{CAT}', null, null, null, null);
insert into public.members values
  ('{ACME}', '{ANN}', 'staff', 'A'), ('{BYTE}', '{ANN}', 'guest', 'ä'), ('{BYTE}', '{BOB}', 'staff', null),
  (null, '{BOB}', null, 'b'), ('{CORP}', '{CAT}', 'hidden', 'a'), ('{CORP}', null, 'A', 'B'), (null, '{CAT}', 'a', 'a');
"""

TABLE: Final = "public.things"


def some_rows(seed: int, count: int) -> Iterator[dict[str, object]]:
    """Rows whose columns have values of `VALUES`, or NULL."""
    chance = random.Random(seed)
    yield {"a": None}
    for _ in range(count):
        yield {name: chance.choice([*values, values[0], None]) for name, values in VALUES.items()}
