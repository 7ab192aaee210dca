-- After the sample schema: what the bridge needs of a Postgres, as its operator would write it. Run by psql, once, when
-- the database is made; \getenv needs psql 15.
\set ON_ERROR_STOP on
\getenv password DATABASE_PASSWORD

-- No superuser: it may replicate, and take the roles that tokens name. It owns no table, so the publication is made here.
create role realtime_bridge login replication noinherit password :'password';
grant anon, authenticated to realtime_bridge;

create publication realtime_bridge for table public.posts with (publish_via_partition_root = true);
