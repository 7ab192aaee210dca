-- What the differential test compares on: every shape of policy that real projects write, one table a shape.
--
-- Tables of `public` are compared; they have a key `id`, and columns whose names and types say what is put into them
-- (world.py). `app` and `private` hold what policies refer to, as projects have it: profiles, memberships, functions.
-- The last statement enables row-level security, old rows and grants wherever a table says nothing else.

-- == roles =============================================================================================================

do $$ begin
  if not exists (select from pg_roles where rolname = 'diff_editor') then
    create role diff_editor nologin inherit;      -- has what `authenticated` has
    grant authenticated to diff_editor;
    create role diff_owner nologin inherit;       -- owns tables
    grant diff_editor, diff_owner to authenticator;
  end if;
exception when duplicate_object or unique_violation then
  null; -- made at the same moment from another database
end $$;

create schema app;
create schema private;                            -- nobody may look names up in it; policies have no need to
grant usage on schema auth, public, app to anon, authenticated, service_role, diff_owner;

-- == what policies refer to ============================================================================================

create table app.profiles (id uuid primary key, org_id int, is_admin bool, role text, level int);
create table app.members (user_id uuid, org_id int, role text, primary key (user_id, org_id));
create table app.bans (user_id uuid, org_id int);                     -- with NULLs: what NOT IN trips over
create table app.projects (id int primary key, org_id int, is_public bool);
create table app.flags (name text primary key, enabled bool);         -- without row-level security
create table app.audit (org_id int);                                  -- which nobody may read
create table app.plans (user_id uuid primary key, name text);
grant select on app.profiles, app.members, app.bans, app.projects, app.flags
  to anon, authenticated, service_role, diff_owner;

alter table app.profiles enable row level security;
create policy own on app.profiles for select using (id = (select auth.uid()));
alter table app.members enable row level security;
create policy own on app.members for select using (user_id = auth.uid());
alter table app.plans enable row level security;                      -- functions of their owner read it

create function app.is_admin() returns bool language sql stable security definer set search_path = '' as
  $$ select exists (select from app.profiles p where p.id = auth.uid() and p.is_admin) $$;
create function app.has_role(wanted text) returns bool language plpgsql stable security definer set search_path = '' as
  $$ begin return exists (select from app.members m where m.user_id = auth.uid() and m.role = wanted); end $$;
create function app.my_orgs() returns setof int language sql stable security definer set search_path = '' as
  $$ select m.org_id from app.members m where m.user_id = auth.uid() $$;
create function app.my_org_array() returns int[] language plpgsql stable security definer set search_path = '' as
  $$ begin return array(select m.org_id from app.members m where m.user_id = auth.uid() and m.role <> 'viewer'); end $$;
create function app.my_company() returns int language sql stable as
  $$ select p.org_id from app.profiles p where p.id = auth.uid() $$;
create function app.is_member(org int) returns bool language sql stable security definer set search_path = '' as
  $$ select exists (select from app.members m where m.user_id = auth.uid() and m.org_id = org) $$;
create function app.can_edit(org int, what text) returns bool language plpgsql stable security definer
  set search_path = '' as $$
  begin
    if what is null then return null; end if;
    return exists (select from app.members m where m.user_id = auth.uid() and m.org_id = org and m.role <> what);
  end $$;
create function app.is_open(kind text) returns bool language plpgsql immutable as
  $$ begin return lower(kind) in ('a', 'b', 'ß'); end $$;
create function private.is_staff() returns bool language sql stable security definer set search_path = '' as
  $$ select exists (select from app.profiles p where p.id = auth.uid() and p.role = 'editor') $$;
create function private.may_read(org int) returns bool language sql stable security definer set search_path = '' as
  $$ select org in (select m.org_id from app.members m where m.user_id = auth.uid() and m.role = 'admin') $$;
-- As most are written: no search path of its own, so that `plan_of_user` is found by the caller's.
create view public.plan_of_user as select user_id, name from app.plans;
create function app.has_plan() returns bool language sql stable security definer as
  $$ select exists (select from plan_of_user where user_id = auth.uid() and name = 'pro') $$;

alter table app.projects enable row level security;
create policy public on app.projects for select using (is_public or org_id in (select app.my_orgs()));

-- == own row, public, claims ===========================================================================================

create table own (id int primary key, owner uuid);
create policy a on own for select using ((select auth.uid()) = owner);

create table notes (id int primary key, owner uuid, is_public bool, deleted bool);
create policy a on notes for select using (auth.uid() = owner or is_public);
create policy b on notes as restrictive using (deleted is not true);
create policy c on notes for insert with check (true);                -- of no concern to who reads
create policy d on notes for update using (true);

create table everyone (id int primary key, kind text);
create policy a on everyone to anon, authenticated using (true);

create table tenants (id int primary key, org text, secret bool);
create policy a on tenants to authenticated using (org = (auth.jwt() ->> 'org') and not secret);
create policy b on tenants for select using ((auth.jwt() ->> 'admin')::boolean);
create policy c on tenants as restrictive for select to anon using (org is null);

create table emails (id int primary key, email text, owner uuid);
create policy a on emails using (email = auth.email() and auth.role() <> 'anon');
create policy b on emails using (owner::text = (auth.jwt() ->> 'sub'));

create table nested (id int primary key, org varchar(20), level int, big bigint);
create policy a on nested using (org = (auth.jwt() -> 'app_metadata' ->> 'org'));
create policy b on nested using (level = (auth.jwt() -> 'app_metadata' ->> 'level')::int);
create policy c on nested using (big = (auth.jwt() -> 'app_metadata' ->> 'level')::bigint and level is null);

create table roles_claimed (id int primary key, kind text);
create policy a on roles_claimed using ((auth.jwt() -> 'app_metadata' -> 'roles') ? 'editor' and kind = 'a');
create policy b on roles_claimed using ((auth.jwt() -> 'app_metadata') @> '{"org": "a"}' and kind <> 'a');

create table orgs_claimed (id int primary key, org text);
create policy a on orgs_claimed using (
  org in (select jsonb_array_elements_text(auth.jwt() -> 'app_metadata' -> 'orgs')));

create table paths_claimed (id int primary key, org text);
create policy a on paths_claimed using (org = auth.jwt() #>> '{app_metadata,org}');
create policy b on paths_claimed using (org = (auth.jwt() -> 'app_metadata' -> 'orgs' ->> 0));

create table selected_claims (id int primary key, org text, level int);
create policy a on selected_claims using (((select auth.jwt()) ->> 'org') = org and (select auth.role()) <> 'anon');
create policy b on selected_claims using (((select auth.jwt()) -> 'app_metadata' ->> 'size')::int = level);
create policy c on selected_claims using (exists (select 1 where auth.uid() is null) and org is null);

create table listed_claims (id int primary key, org text, is_public bool);
create policy a on listed_claims using (org = any (string_to_array(auth.jwt() ->> 'org', ',')));
create policy b on listed_claims using ((auth.jwt() -> 'app_metadata' -> 'orgs') ? org and is_public);
create policy c on listed_claims using (is_public = (auth.jwt() ->> 'admin')::bool and org = 'a');

create table settings_read (id int primary key, owner uuid);
create policy a on settings_read using (
  owner::text = current_setting('request.jwt.claims', true)::json ->> 'sub');

create table ordered_claims (id int primary key, level int, org text);
create policy a on ordered_claims using (level <= (auth.jwt() ->> 'level')::int and org is not null);

-- == functions and sub-selects of the user alone =======================================================================

create table admins (id int primary key, kind text);
create policy a on admins using (app.is_admin() or kind = 'a');

create table of_role (id int primary key, kind text, org_id int);
create policy a on of_role using ((select app.has_role('admin')) and kind is not null);
create policy b on of_role using (exists (select from app.profiles where id = auth.uid() and role = 'editor') and org_id > 2);
create policy c on of_role as restrictive using (not app.has_role('banned'));

create table staff (id int primary key, kind text);
create policy a on staff using (private.is_staff() and kind <> 'x');

create table planned (id int primary key, kind text);
create policy a on planned using (app.has_plan() and kind in ('a', 'b'));

create table flagged (id int primary key, kind text);
create policy a on flagged using ((select enabled from app.flags where name = 'beta') and kind = 'a');
create policy b on flagged using (exists (select from app.flags f where f.name = auth.role() and f.enabled) and kind = 'b');

-- == row and user joined by a set =====================================================================================

create table org_documents (id int primary key, org_id int);
create policy a on org_documents using (org_id in (select m.org_id from app.members m where m.user_id = auth.uid()));

create table org_sets (id int primary key, org_id int, kind text);
create policy a on org_sets using (org_id in (select app.my_orgs()) and kind = 'a');
create policy b on org_sets using (org_id = any (app.my_org_array()) and kind = 'b');
create policy c on org_sets using (org_id = any (array(select p.org_id from app.profiles p)) and kind = 'x');

create table companies (id int primary key, org_id int, is_public bool);
create policy a on companies using (org_id = app.my_company());
create policy b on companies using (org_id = (select p.level from app.profiles p where p.id = auth.uid()) and is_public);

create table exists_one (id int primary key, org_id int, kind text);
create policy a on exists_one using (exists (
  select 1 from app.members m where m.org_id = exists_one.org_id and m.user_id = (select auth.uid())
    and m.role in ('admin', 'owner')));

create table exists_own (id int primary key, org_id int);              -- only members' own policy names the user
create policy a on exists_own using (exists (select from app.members where members.org_id = exists_own.org_id));

create table exists_two (id int primary key, org_id int, kind text);
create policy a on exists_two using (exists (
  select from app.members m where m.user_id = auth.uid() and m.org_id = exists_two.org_id and m.role = exists_two.kind));

create table exists_joined (id int primary key, project_id int);
create policy a on exists_joined using (exists (
  select from app.projects p join app.members m on m.org_id = p.org_id
  where p.id = exists_joined.project_id and m.user_id = auth.uid()));

create table exists_parent (id int primary key, project_id int);       -- does not mention the user at all
create policy a on exists_parent using (exists (
  select from app.projects p where p.id = exists_parent.project_id and p.is_public));

create table exists_none (id int primary key, org_id int);
create policy a on exists_none using (not exists (
  select from app.members m where m.org_id = exists_none.org_id and m.user_id = auth.uid()));

create table exists_first (id int primary key, org_id int);            -- a LIMIT must not be taken apart
create policy a on exists_first using (exists (
  select from (select m.org_id from app.members m where m.user_id = auth.uid() order by m.org_id limit 1) f
  where f.org_id = exists_first.org_id));

create table exists_many (id int primary key, org_id int);
create policy a on exists_many using ((
  select count(*) from app.members m where m.user_id = auth.uid() and m.org_id >= exists_many.org_id) > 1);

create table exists_count (id int primary key, org_id int);            -- an aggregate always brings a row
create policy a on exists_count using (exists (
  select count(*) from app.members m where m.org_id = exists_count.org_id and m.user_id = auth.uid()) and org_id > 3);

create table exists_having (id int primary key, org_id int);
create policy a on exists_having using (exists (
  select m.user_id from app.members m where m.org_id >= exists_having.org_id and m.user_id = auth.uid()
  group by m.user_id having count(*) > 1));

create table exists_offset (id int primary key, project_id int);
create policy a on exists_offset using (exists (
  select from app.members m where m.user_id = auth.uid() and m.org_id > exists_offset.project_id offset 1));

create table exists_union (id int primary key, org_id int);
create policy a on exists_union using (exists (
  select m.org_id from app.members m where m.org_id = exists_union.org_id and m.user_id = auth.uid()
  union all select b.org_id from app.bans b where b.user_id = auth.uid()));

create table exists_outer (id int primary key, org_id int);            -- an ON of an outer join leaves no row out
create policy a on exists_outer using (exists (
  select from app.profiles p left join app.members m on m.org_id = exists_outer.org_id where p.id = auth.uid()));

create table exists_either (id int primary key, org_id int);
create policy a on exists_either using (exists (
  select from app.members m where m.user_id = auth.uid() and (m.org_id = exists_either.org_id or m.role = 'editor')));

create table exists_other (id int primary key, org_id int);
create policy a on exists_other using (exists (
  select from app.members m where m.user_id = auth.uid() and m.org_id <> exists_other.org_id));

create table exists_sum (id int primary key, level int);
create policy a on exists_sum using (exists (
  select from app.members m where m.user_id = auth.uid() and m.org_id = exists_sum.level + 1));

create table exists_wide (id int primary key, big bigint, sub text);
create policy a on exists_wide using (exists (
  select from app.members m where m.user_id = auth.uid() and m.org_id = exists_wide.big));
create policy b on exists_wide using (exists (
  select from app.members m where m.user_id::text = exists_wide.sub and m.role = 'admin'));

create table exists_nested (id int primary key, project_id int);
create policy a on exists_nested using (exists (
  select from app.projects p where p.id = exists_nested.project_id and exists (
    select from app.members m where m.org_id = p.org_id and m.user_id = auth.uid())));

create table exists_shadowed (id int primary key, org_id int);         -- the inner table goes by the outer one's name
create policy a on exists_shadowed using (exists (
  select from app.members exists_shadowed where exists_shadowed.user_id = auth.uid() and org_id = 1) and org_id = 1);

create table in_correlated (id int primary key, org_id int, kind text);
create policy a on in_correlated using (org_id in (
  select m.org_id from app.members m where m.user_id = auth.uid() and m.role = in_correlated.kind));

create table in_rows (id int primary key, org_id int, kind text, owner uuid);
create policy a on in_rows using ((org_id, kind) in (select m.org_id, m.role from app.members m where m.user_id = auth.uid()));
create policy b on in_rows using ((owner, org_id) = (auth.uid(), app.my_company()));

create table scalar_correlated (id int primary key, org_id int);
create policy a on scalar_correlated using ((
  select m.role from app.members m where m.org_id = scalar_correlated.org_id and m.user_id = auth.uid()) <> 'viewer');
create policy b on scalar_correlated using ((
  select bool_and(m.role = 'admin') from app.members m
  where m.org_id = scalar_correlated.org_id and m.user_id = auth.uid()));

create table not_in_set (id int primary key, org_id int);
create policy a on not_in_set using (org_id not in (select b.org_id from app.bans b where b.user_id = auth.uid()));

create table not_in_list (id int primary key, level int, kind text);
create policy a on not_in_list using (level not in (1, null) or kind = 'None');
create policy b on not_in_list using (level in (2, null) or kind not in ('a', 'b', 'ß'));

create table not_any (id int primary key, org_id int);
create policy a on not_any using (not (org_id = any (app.my_org_array())) and org_id <> all (array[1, 2]));

-- == functions of a row ===============================================================================================

create table opaque_sql (id int primary key, org_id int);
create policy a on opaque_sql using (app.is_member(org_id));

create table opaque_plpgsql (id int primary key, org_id int, kind text);
create policy a on opaque_plpgsql using (app.can_edit(org_id, kind));

create table opaque_private (id int primary key, org_id int);
create policy a on opaque_private using (private.may_read(org_id));

create table opaque_negated (id int primary key, org_id int, kind text);
create policy a on opaque_negated using (not app.can_edit(org_id, kind) and app.is_open(kind));

-- == arrays ===========================================================================================================

create table shared (id int primary key, readers uuid[], owner uuid);
create policy a on shared using (auth.uid() = any (readers) or owner = auth.uid());

create table tagged (id int primary key, tags text[]);
create policy a on tagged using ((auth.jwt() ->> 'org') = any (tags));

create table untagged (id int primary key, tags text[], levels int[]);
create policy a on untagged using (not ('a' = any (tags)) and tags @> array['b']);
create policy b on untagged using (1 <> all (levels) and array_length(levels, 1) = 2);
create policy c on untagged using (2 = any (levels) and tags is null);

create table readable (id int primary key, readers uuid[], owner uuid, parent_owner uuid, tags text[]);
create policy a on readable using (readers @> array[auth.uid()] and tags is null);
create policy b on readable using (auth.uid() in (owner, parent_owner));
create policy c on readable using ((auth.uid())::text = any (tags) or array[owner, parent_owner] && readers);

-- == logic ============================================================================================================

create table coalesced (id int primary key, owner uuid, is_public bool, org text);
create policy a on coalesced using (coalesce(is_public, false) and owner is not null);
create policy b on coalesced using (coalesce(owner, '00000000-0000-0000-0000-000000000000') = auth.uid());
create policy c on coalesced using (coalesce(org, 'a') = coalesce(auth.jwt() ->> 'org', 'b') and is_public is null);

create table logic (id int primary key, a bool, b bool, n int, owner uuid);
create policy a on logic using (not (a or n = 1) is not true and b is not null);
create policy b on logic using ((a and b) is unknown and (n <> 2 or owner = auth.uid()) is not false);
create policy c on logic using (not (a and not (b or n is null)) and not ((n = 1) is null));
create policy d on logic as restrictive using (auth.role() in ('authenticated', 'anon') or (n = 2) is true);

create table negated (id int primary key, owner uuid, org text, level int);
create policy a on negated using (not (owner = auth.uid() or org = (auth.jwt() ->> 'org') or level = 1));

create table folded_logic (id int primary key, kind text, is_public bool, level int);
create policy a on folded_logic using (1 = 1 and nullif(kind, 'a') is null and level between symmetric 3 and 1);
create policy b on folded_logic using (is_public is distinct from false and greatest(level, 2) = 2);
create policy c on folded_logic using ((is_public = true) is not unknown and level = 1.0);

create table quoted (id int primary key, "Owner" uuid, "a ""b" text, "select" int);
create policy "a ""policy" on quoted using ("Owner" = auth.uid() or "a ""b" = 'a' and "select" > 1);

create table cases (id int primary key, owner uuid, is_public bool, kind text);
create policy a on cases using (case when is_public then true when kind = 'a' then owner = auth.uid() else kind = 'b' end);

create table distinct_from (id int primary key, owner uuid, kind text, n int);
create policy a on distinct_from using (owner is not distinct from auth.uid() and kind is distinct from 'a');
create policy b on distinct_from using ((n is distinct from 3) is not true and kind is not null);

-- == roles and grants =================================================================================================

create table by_role (id int primary key, a bool, n int);
create policy a on by_role to authenticated using (a);
create policy b on by_role to anon using (n = 1);
create policy c on by_role to diff_editor using (n = 2);
create policy d on by_role as restrictive to diff_editor using (n <> 3 or a);

create table by_current_user (id int primary key, kind text);
create policy a on by_current_user using (current_user = kind or current_role::text = 'anon' and kind = 'a');

create table some_columns (id int primary key, owner uuid, secret text);
create policy a on some_columns using (owner = auth.uid() or secret = 'a');
grant select (id, owner) on some_columns to anon, authenticated, diff_owner;

create table ungranted (id int primary key, kind text);
create policy a on ungranted using (true);
grant select on ungranted to anon;

create table owned (id int primary key, kind text);
create policy a on owned using (kind = 'a');
alter table owned owner to diff_owner;

create table owned_forced (id int primary key, kind text);
create policy a on owned_forced using (kind = 'a');
alter table owned_forced owner to diff_owner;
alter table owned_forced force row level security;

create table silent (id int primary key, kind text);                   -- row-level security, and no policy

create table only_restrictive (id int primary key, kind text);
create policy a on only_restrictive as restrictive using (true);

create table unprotected (id int primary key, kind text);              -- delivered by a rule alone
alter table unprotected disable row level security;

create table ruled (id int primary key, owner uuid, kind text, org_id int);
create policy a on ruled using (owner = auth.uid() or kind in ('a', 'ß')
  or exists (select 1 from app.members m where m.user_id = auth.uid() and m.org_id = ruled.org_id));
grant select on ruled to anon, authenticated, diff_owner;              -- a rule binds service_role, a policy does not

-- == types ============================================================================================================

create table documents (id int primary key, meta jsonb);
create policy a on documents using (meta ->> 'kind' = 'a' or meta @> '{"public": true}');
create policy b on documents using ((meta -> 'acl') ? (auth.uid())::text);
create policy c on documents using (meta ->> 'org' = (auth.jwt() ->> 'org'));
create policy d on documents using (meta = '{"size": 1}');

create type app.mood as enum ('happy', 'sad', 'None');
create table moods (id int primary key, feeling app.mood);
create policy a on moods using (feeling <> 'sad' and feeling::text <> 'None');
create policy b on moods using (feeling = (auth.jwt() ->> 'feeling')::app.mood);
create policy c on moods using (feeling > 'sad' and auth.role() = 'anon');

create domain app.label as varchar(20);
create domain app.positive as int check (value > 0);
create table labels (id int primary key, label app.label, size app.positive);
create policy a on labels using (label = 'a' or label = (auth.jwt() ->> 'org'));
create policy b on labels using (size = 7 or size::int = (auth.jwt() -> 'app_metadata' ->> 'size')::app.positive);

create table amounts (id int primary key, amount numeric, price numeric(10, 2));
create policy a on amounts using (amount = 1.0 or price = 100);
create policy b on amounts using (amount = (auth.jwt() ->> 'amount')::numeric);
create policy c on amounts using (amount > 'NaN'::numeric - 1 and price is null);

create table ordered_amounts (id int primary key, amount numeric, n int);
create policy a on ordered_amounts using (amount < 1.5 and n >= 2);
create policy b on ordered_amounts using (amount >= (auth.jwt() ->> 'amount')::numeric);

create table floats (id int primary key, ratio float8, small float4, n int);
create policy a on floats using (ratio = 0.1 or ratio = 0 or small = 0.1);
create policy b on floats using (n = small or ratio > 1e300);

create table times (id int primary key, at timestamptz, local timestamp, day date, span interval, hour time);
create policy a on times using (at = '2024-02-29 12:00:00.5+00' or local = 'infinity');
create policy b on times using (day < '0044-03-15 BC' or at > '2999-01-01');
create policy c on times using (span = '1 day' or hour = '12:00');
create policy d on times using (day = (auth.jwt() ->> 'day')::date);

create table clock (id int primary key, at timestamptz, kind text);
create policy a on clock using (at > now() and kind is not null);
create policy b on clock using (at::date < current_date and kind = 'a');

create table bytes (id int primary key, payload bytea);
create policy a on bytes using (payload = '\x00ff' or payload = convert_to(auth.jwt() ->> 'org', 'UTF8'));

create table networks (id int primary key, address inet, span int4range);
create policy a on networks using (address <<= '10.0.0.0/8' or address = '::1');
create policy b on networks using (span @> 3 and address is null);

create type app.place as (x int, name text);
create table places (id int primary key, place app.place, tag name);
create policy a on places using ((place).x = 1 or (place).name = (auth.jwt() ->> 'org'));
create policy b on places using (tag = 'a' and (place).x is distinct from 2);
create policy c on places using (place is null);

create table padded (id int primary key, code char(3), name varchar(20));
create policy a on padded using (code = 'a' or code = (auth.jwt() ->> 'org'));
create policy b on padded using (name = 'a ' or code::text = 'b');

create table folded (id int primary key, name text);
create policy a on folded using (lower(name) = lower(auth.jwt() ->> 'org'));
create policy b on folded using (upper(name) = 'SS' or name like 'a\%%');

create table ordered_texts (id int primary key, name text, code text collate "C");
create policy a on ordered_texts using (name < 'b' and code >= 'a');
create policy b on ordered_texts using (name ilike '%' || (auth.jwt() ->> 'org') || '%' and code is null);
create policy c on ordered_texts using (name ~ '^[ab]' and code similar to '(a|b)%');

-- needs citext
create extension citext schema app;
create table case_less (id int primary key, name app.citext);
create policy a on case_less using (name = 'a' or name = (auth.jwt() ->> 'org'));

-- needs ltree
create extension ltree schema app;
create table trees (id int primary key, place app.ltree);
create policy a on trees using (place operator(app.<@) 'a.b');

-- needs icu
create collation app.loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
create table collated (id int primary key, name text collate app.loose);
create policy a on collated using (name = 'a' or name = (auth.jwt() ->> 'org'));

-- == tables of other kinds ============================================================================================

create table partitioned (id int primary key, owner uuid, kind text) partition by range (id);
create table partitioned_low partition of partitioned for values from (minvalue) to (20);
create table partitioned_high partition of partitioned for values from (20) to (maxvalue);
create policy a on partitioned using (owner = auth.uid() or kind = 'a');

create table composite (id int, org_id int not null, owner uuid, primary key (org_id, id));
create policy a on composite using (owner = auth.uid() or org_id = 2);

create table large (id int primary key, owner uuid, body text);
alter table large alter body set storage external;
create policy a on large using (owner = auth.uid() and length(body) > 100);
create policy b on large using (body = 'a');

create table thin (id int primary key, owner uuid, kind text);         -- brings its key alone as the old row
alter table thin replica identity default;
create policy a on thin using (owner = auth.uid() or kind = 'a' or owner is null);

create table tree (id int primary key, parent int, owner uuid);        -- refers to itself, through a function
create function app.owns_node(node int) returns bool language sql stable security definer set search_path = '' as
  $$ select exists (select from public.tree t where t.id = node and t.owner = auth.uid()) $$;
create policy a on tree using (owner = auth.uid() or app.owns_node(parent));

create table endless (id int primary key, parent int, owner uuid);     -- refers to itself, which Postgres refuses
create policy a on endless using (owner = auth.uid() or exists (select from endless e where e.id = endless.parent));

-- == policies that raise ==============================================================================================

create table divided (id int primary key, n int, is_public bool);
create policy a on divided using (is_public or 6 / n > 2);

create table divided_first (id int primary key, n int, is_public bool);
create policy a on divided_first using (6 / n > 2 or is_public);

create table forbidden (id int primary key, org_id int, is_public bool);
create policy a on forbidden using (is_public and org_id in (select u.org_id from app.audit u));

create table cast_column (id int primary key, level text, is_public bool);
create policy a on cast_column using (case when level ~ '^[0-9]{1,3}$' then level::int > 1 else is_public end);

create table cast_claim (id int primary key, level int, is_public bool);
create policy a on cast_claim using (is_public);
create policy b on cast_claim using (level = (auth.jwt() ->> 'level')::smallint);

create table unsteady (id int primary key, kind text);
create policy a on unsteady using (random() >= 0 and kind = 'a' and clock_timestamp() > '2001-01-01');

-- == what no change brings, or nobody else may set: never shown ========================================================

create table refused_generated (id int primary key, kind text, twice text generated always as (kind || kind) stored);
create policy a on refused_generated using (twice = 'aa');

create table refused_row (id int primary key, kind text);
create function app.is_shown(r refused_row) returns bool language sql stable as $$ select r.kind = 'a' $$;
create policy a on refused_row using (app.is_shown(refused_row));

create table refused_system (id int primary key, kind text);
create policy a on refused_system using (tableoid = 'refused_system'::regclass and kind = 'a');

create table refused_setting (id int primary key, kind text);
create policy a on refused_setting using (current_setting('request.headers', true) is null);

-- == what every table has =============================================================================================

do $$
declare
  t record;
begin
  for t in
    select c.oid::regclass as name, c.relname, c.relreplident
    from pg_class c
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and c.relname <> 'posts'
  loop
    if t.relname <> 'unprotected' then
      execute format('alter table %s enable row level security', t.name);
    end if;
    if t.relname not in ('thin', 'refused_generated') then  -- Postgres 18 allows no update of the latter with old rows
      execute format('alter table %s replica identity full', t.name);
    end if;
    if t.relname not in ('some_columns', 'ungranted', 'ruled') then
      execute format('grant select on %s to anon, authenticated, service_role, diff_owner', t.name);
    end if;
  end loop;
end $$;
