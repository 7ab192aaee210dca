"""The whole way of a change, by every source and broker: {postgres, supabase} × {memory, Valkey}.

Whatever a client sees is tested on all four: a test takes the fixture `way`, opens a bridge (or replicas) with it, and
never asks which it is, but for what a source cannot promise; that it asks of the way by name, and asserts what is
promised instead.

Tests of one part alone do not take it, since the other parts would only repeat them:

    test_{postgres,supabase}_source, test_local_supabase   one source each, at its contract
    test_without_database, test_check_supabase             what those have who come with a project alone
    contract/, faults/test_redis_broker                    brokers, at theirs
    test_policy, test_values_against_postgres              deciding and encoding, against Postgres
    test_database, test_posts                              asyncpg behind /posts; no change is read
    test_sinks, test_jwks_server, test_origins             sinks, keys and headers, before anything of the way is asked
    test_check, test_teardown                              each part in turn, by themselves
    test_tail, test_client_node, browser/                  clients, which see the messages that are tested on all four
    test_dev, test_engines, test_wheel, test_deployment    programs and packaging; `dev` has a test per combination
    faults/                                                a fault each, of the part that has it

Fixtures `database`, `redis_url` and `namespace` give each test its own.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import product
from typing import Final

from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.dev.supabase.changes import PUBLICATION as SUPABASE_PUBLICATION
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.services import SECRET, token

SERVICE_KEY: Final = token(None, role="service_role")
ANON_KEY: Final = token(None, role="anon")
SOURCES: Final = ("postgres", "supabase")
BROKERS: Final = ("memory", "valkey")
WAYS: Final = tuple(f"{source}-{broker}" for source, broker in product(SOURCES, BROKERS))
POSTGRES_WAYS: Final = tuple(name for name in WAYS if name.startswith("postgres"))
SUPABASE_WAYS: Final = tuple(name for name in WAYS if name.startswith("supabase"))
SHARED_WAYS: Final = tuple(name for name in WAYS if name.endswith("valkey"))


@dataclass(frozen=True)
class Way:
    """One of the four, on a database of the test's own.

    Attributes:
        database: the address of the database that changes are made in.
        redis_url: empty for the memory broker.
    """

    source: str
    database: str
    redis_url: str
    namespace: str

    @property
    def is_shared(self) -> bool:
        """Whether several bridges can have one history."""
        return bool(self.redis_url)

    @property
    def has_public_keys(self) -> bool:
        """Whether tokens are verified by a project's public keys, too, so that no algorithm of those is foreign."""
        return self.source == "supabase"

    @property
    def forgets_its_place(self) -> bool:
        """Whether nobody can tell what was committed while no bridge was reading, so that copies are doubted."""
        return self.source == "supabase"

    @property
    def publication(self) -> str:
        """Of what a table must be to be told of."""
        return PUBLICATION if self.source == "postgres" else SUPABASE_PUBLICATION

    @property
    def tells_keyless(self) -> bool:
        """Whether changes of a table without primary key are told: of those, Supabase sends no more than an error."""
        return self.source == "postgres"

    @property
    def tells_partitions(self) -> bool:
        """Whether a change of a partition is told as one of the partitioned table."""
        return self.source == "postgres"

    @property
    def tells_rights(self) -> bool:
        """Whether a change of rights is told in its place among the changes; else it is noticed soon after."""
        return self.source == "postgres"

    @asynccontextmanager
    async def upstream(self, *tables: str) -> AsyncIterator[dict[str, str]]:
        """Publish the tables; yields the settings of a bridge, beside `DATABASE_URL`, to be told of them."""
        settings = {
            "BRIDGE_NAMESPACE": self.namespace,
            "BRIDGE_SLOT": self.namespace.replace("-", "_"),
            "BRIDGE_TABLES": ",".join(tables),
        }
        if self.redis_url:
            settings["REDIS_URL"] = self.redis_url
        if self.source == "postgres":
            await ensure_publication(self.database, PUBLICATION, tables)
            yield settings
            return
        async with LocalSupabase(
            self.database, jwt_secret=SECRET, service_key=SERVICE_KEY, anon_key=ANON_KEY, tables=tables
        ) as supabase:
            yield {**settings, "SUPABASE_URL": supabase.url, "SUPABASE_KEY": SERVICE_KEY}

    @asynccontextmanager
    async def bridge(self, *tables: str, **settings: str) -> AsyncIterator[BridgeProcess]:
        """One bridge that serves the tables, else `posts` alone."""
        async with self.replicas(1, *tables, **settings) as [bridge]:
            yield bridge

    @asynccontextmanager
    async def replicas(self, count: int, *tables: str, **settings: str) -> AsyncIterator[Sequence[BridgeProcess]]:
        """So many bridges on one history; the first of them leads."""
        assert count == 1 or self.is_shared, "a history in memory is of one process"
        async with self.upstream(*(tables or ("public.posts",))) as given, AsyncExitStack() as stack:
            bridges = [BridgeProcess(self.database, **{**given, **settings}) for _ in range(count)]
            for bridge in bridges:
                await stack.enter_async_context(bridge)
            yield bridges
