"""What Postgres itself shows: a `SELECT` as each user, under that role and those claims.

One statement asks for all users and tables. Inputs are held in variables before the role is switched, and the role is
set back after every user. Where the whole `SELECT` raises, each row is asked for by its key, and one that raises then
is a row that the user is not shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg

from realtime_bridge.claims import Claims

_INSTALL: Final = """
create schema if not exists truth;
create or replace function truth.shown(
  encoded text[], subs text[], emails text[], roles text[], tables text[])
returns table (who int, tab text, keys int[], failed int[], raised bool) language plpgsql as $$
declare
  every jsonb := '{}';
  candidate int;
  found int[];
begin
  foreach tab in array tables loop
    execute format('select jsonb_set($1, array[$2], coalesce(jsonb_agg(id), ''[]'')) from %s', tab)
      into every using every, tab;
  end loop;
  for n in 1..cardinality(roles) loop
    who := n - 1;
    perform set_config('request.jwt.claims', encoded[n], true),
            set_config('request.jwt.claim', encoded[n], true),
            set_config('request.jwt.claim.sub', subs[n], true),
            set_config('request.jwt.claim.role', roles[n], true),
            set_config('request.jwt.claim.email', emails[n], true),
            set_config('role', roles[n], true);
    foreach tab in array tables loop
      raised := false;
      keys := '{}';
      failed := '{}';
      begin
        execute format('select coalesce(array_agg(id), ''{}'') from %s', tab) into keys;
      exception
        when insufficient_privilege or invalid_object_definition then  -- whatever the rows are
          raised := true;
        when others then
          raised := true;
          keys := null;
      end;
      if keys is null then
        keys := '{}';
        perform set_config('enable_seqscan', 'off', true);
        for candidate in select k::int from jsonb_array_elements_text(every -> tab) k loop
          begin
            execute format('select array_agg(id) from %s where id = $1', tab) into found using candidate;
            keys := keys || found;
          exception when others then
            failed := failed || candidate;
          end;
        end loop;
        perform set_config('enable_seqscan', 'on', true);
      end if;
      return next;
    end loop;
    perform set_config('role', 'none', true);
  end loop;
end $$
"""


@dataclass
class Truth:
    """Who is shown what, at one moment.

    Attributes:
        shown: (table, key) → numbers of the users who are shown that row.
        raised: (table, user) whose `SELECT` of the whole table raised.
        failed: (table, key) → users for whom that row raises.
    """

    shown: dict[tuple[str, int], set[int]] = field(default_factory=dict)
    raised: set[tuple[str, int]] = field(default_factory=set)
    failed: dict[tuple[str, int], set[int]] = field(default_factory=dict)


async def look(connection: "psycopg.AsyncConnection[Any]", users: Sequence[Claims], tables: Sequence[str]) -> Truth:
    """Ask Postgres, in one transaction, which changes nothing."""
    truth = Truth()

    def claim(name: str) -> list[str]:
        return [value if isinstance(value := user.values.get(name), str) else "" for user in users]

    async with connection.transaction(force_rollback=True):
        await connection.execute(_INSTALL)
        await connection.execute("set local search_path = public, extensions, pg_temp; set local timezone = 'UTC'")
        answers = await connection.execute(
            "select * from truth.shown(%s, %s, %s, %s, %s)",
            [
                [user.encoded for user in users],
                claim("sub"),
                claim("email"),
                [user.role for user in users],
                list(tables),
            ],
        )
        async for who, table, keys, failed, raised in answers:
            for key in keys:
                truth.shown.setdefault((table, key), set()).add(who)
            for key in failed:
                truth.failed.setdefault((table, key), set()).add(who)
            if raised:
                truth.raised.add((table, who))
    return truth
