"""Several hubs on one broker, each with a catalog and facts that a test sets by hand, and readers that go to and fro.

Each process looks at its catalog when the test says so. All else is as it is.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

from realtime_bridge.broker.base import Broker
from realtime_bridge.change import Change, Column, Relation
from realtime_bridge.errors import DatabaseError
from realtime_bridge.policy.atoms import Values
from realtime_bridge.policy.blocks import Declared
from realtime_bridge.policy.catalog import Catalog, CatalogPolicy, CatalogTable
from realtime_bridge.policy.compiler import ColumnType
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.policy.expression import Query
from realtime_bridge.policy.keeping import CatalogFunction, CatalogRelation, Owner, References
from realtime_bridge.rights import RIGHTS, RightsState, RightsTeller
from realtime_bridge.rows import IndexState, RowIndex
from tests.hubs import (
    ANN,
    BOB,
    COLUMNS,
    NOTES,
    POSTS,
    ForkingBroker,
    HubWorld,
    hub_of,
    insert,
    poll,
)
from tests.services import eventually

ROLE = "authenticated"
OWN, ALL = "(auth.uid() = owner)", "true"
TOLD = ["visibility_changed"]
ALWAYS = 1_000_000


class SetCatalog:
    """A catalog in which every table has one policy, or is not there.

    Attributes:
        policies: table → expression, or None; shared by all processes of a test.
        failures: so many of the next reads fail.
    """

    def __init__(self, policies: Mapping[str, str | None]) -> None:
        self.policies = policies
        self.failures = 0

    async def read(self, tables: Sequence[str], *_: object) -> Mapping[str, CatalogTable]:
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise DatabaseError("away")
        return {name: described(name, sql) for name, sql in self.policies.items() if sql is not None and name in tables}


def described(name: str, policy: str) -> CatalogTable:
    readable = {ROLE: frozenset(COLUMNS)}
    return CatalogTable(
        name,
        1,
        {column: ColumnType(kind) for column, kind in COLUMNS.items()},
        {column: Declared(kind) for column, kind in COLUMNS.items()},
        ("id",),
        True,
        (CatalogPolicy("p", True, policy, frozenset({ROLE})),),
        frozenset({ROLE}),
        readable,
        frozenset(),
        frozenset({"uid", "role", "email", "jwt"}),
        References({}, {}, ()),
        "",
    )


@dataclass
class Replica:
    """One process. `look` has it find what has changed."""

    world: HubWorld
    catalog: SetCatalog

    async def look(self) -> None:
        hub = self.world.hub
        if await self.world.policy.outdated():
            async with hub._standing.turn:
                await hub._fan_out.reload("*", hub._standing.number + 1)


@dataclass
class Replicas:
    """Several processes, of which one may tell rights.

    Attributes:
        policies: what the catalog says.
        rights: what was told of them.
    """

    broker: ForkingBroker
    policies: dict[str, str | None]
    tasks: asyncio.TaskGroup
    all: list[Replica] = field(default_factory=list)
    rights: RightsState = field(default_factory=RightsState)

    async def start(self, rules: Mapping[str, str] | None = None, *, has_catalog: bool = True) -> Replica:
        catalog = SetCatalog(self.policies)
        policy = PolicyEngine([POSTS, NOTES], [ROLE], rules or {}, cast(Catalog, catalog) if has_catalog else None)
        hub = await hub_of(self.broker, policy)
        task = self.tasks.create_task(hub.run())
        await hub.begun()
        world = HubWorld(hub, self.broker, policy, self.broker._token, self.tasks, task)
        self.all.append(Replica(world, catalog))
        return self.all[-1]

    async def lead(self, policy: PolicyEngine) -> asyncio.Task[Any]:
        """Have a process tell of rights, from now on."""
        rows = RowIndex(cast(Broker, self.broker), [POSTS, NOTES], IndexState())
        rows.begun.set()
        teller = RightsTeller(self.broker, policy, rows, self.rights, self.broker._token)
        task = self.tasks.create_task(teller.run())
        await eventually(lambda: RIGHTS in self.broker._index.indexed())
        return task

    async def append(self, *keys: int, owner: str = ANN) -> None:
        await self.all[0].world.append(*(insert(key, owner) for key in keys))
        await self.settled()

    async def settled(self) -> None:
        for replica in self.all:
            await replica.world.settled()

    async def told(self, entries: int) -> None:
        """So many entries of rights were told, and all processes have passed them."""
        await eventually(lambda: self.rights.told == entries)
        await self.settled()


@asynccontextmanager
async def replicas(policies: Mapping[str, str | None]) -> AsyncIterator[Replicas]:
    broker = ForkingBroker()
    await broker.acquire_lease(ttl=600)
    async with asyncio.TaskGroup() as tasks:
        it = Replicas(broker, dict(policies), tasks)
        before = asyncio.all_tasks()
        yield it
        for replica in it.all:
            for connection in tuple(replica.world.hub.connections):
                replica.world.hub.close(connection)
        for task in asyncio.all_tasks() - before:
            task.cancel()


@dataclass
class Poller:
    """One reader of Bob's: what each poll tells it, as keys of rows and reasons of resyncs."""

    position: str | None = None

    async def poll(self, replica: Replica, *, wait: float = 0.0) -> list[Any]:
        answer = await poll(replica.world, BOB, self.position, wait=wait)
        self.position = answer["position"]
        return [m["reason"] if m["type"] == "resync" else m["record"]["id"] for m in answer["messages"]]


THIRD = "(owner is not null)"


async def moved(connection: Any, before: Replica, after: Replica) -> Any:
    """The reader of a connection of Bob's, after it has gone from one process to another."""
    position = before.world.hub.position_of(connection)
    before.world.hub.close(connection)
    _, reader = await after.world.connect(BOB, position)
    await after.world.settled()
    return reader


FLAG = "(EXISTS ( SELECT 1 FROM public.settings))"
TEAM = "(team IN (SELECT m.team FROM public.members m WHERE m.user_id = auth.uid()))"
ASKED = (
    "(EXISTS (SELECT 1 FROM public.members m WHERE m.team = posts.team AND m.user_id = auth.uid() AND m.id < posts.id))"
)
SETTINGS = Relation("public", "settings", (Column("id", "int8"),), (0,), True)
MEMBERS = Relation(
    "public", "members", (Column("id", "int8"), Column("user_id", "uuid"), Column("team", "text")), (0,), True
)
SUPER = Owner("postgres", True)
REFERENCES = References(
    {"auth.uid": (CatalogFunction("sql", "s", reads_claims=True),)},
    {"public.settings": CatalogRelation("r", SUPER), "public.members": CatalogRelation("r", SUPER)},
    ("public",),
)


class FactCatalog(SetCatalog):
    """Its policies may refer to `settings` and `members`, whose changes come through the history."""

    async def read(self, tables: Sequence[str], *_: object) -> Mapping[str, CatalogTable]:
        return {name: replace(t, references=REFERENCES) for name, t in (await super().read(tables)).items()}

    async def published(self, publication: str) -> set[str]:
        return {"public.settings", "public.members", POSTS, NOTES}


@dataclass
class World:
    """What Postgres would say of Bob.

    Attributes:
        flag: whether `settings` has a row.
        teams: his.
    """

    flag: bool = True
    teams: frozenset[str] = frozenset({"none"})


class SetAsking:
    """Answers what policies ask of users and rows.

    Attributes:
        fails: it cannot be asked.
        types_fail: queries whose type cannot be told.
        gate: facts are told once it is set.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.fails = False
        self.types_fail: set[str] = set()
        self.gate: asyncio.Event | None = None

    async def types(self, queries: Any) -> dict[str, str | None]:
        await asyncio.sleep(0)
        for query in queries:
            if query.sql in self.types_fail:
                raise DatabaseError("away")
        return {query.sql: "text" if query.many else "bool" for query in queries}

    async def facts(self, users: Any, queries: Sequence[Query]) -> list[dict[str, object]]:
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.fails:
            raise DatabaseError("away")
        known = {query.sql: Values(self.world.teams) if query.many else "ft"[self.world.flag] for query in queries}
        return [dict(known) for _ in users]

    async def answers(self, columns: Any, questions: Sequence[Any]) -> list[Any]:
        await asyncio.sleep(0)
        if self.fails:
            raise DatabaseError("away")
        return ["none" in self.world.teams for _ in questions]


async def start(it: Replicas, world: World, fact_seconds: float = 3600) -> tuple[Replica, SetAsking]:
    """One more process, which asks for facts."""
    catalog, asking = FactCatalog(it.policies), SetAsking(world)
    policy = PolicyEngine(
        [POSTS, NOTES],
        [ROLE],
        {},
        cast(Catalog, catalog),
        cast(Any, asking),
        publication="p",
        fact_seconds=fact_seconds,
    )
    hub = await hub_of(it.broker, policy)
    task = it.tasks.create_task(hub.run())
    await hub.begun()
    it.all.append(Replica(HubWorld(hub, it.broker, policy, it.broker._token, it.tasks, task), catalog))
    return it.all[-1], asking


def setting(operation: str = "INSERT") -> Change:
    image = ("1",)
    if operation == "DELETE":
        return Change("DELETE", SETTINGS, image, None, 0)
    return Change("INSERT", SETTINGS, None, image, 0)


def leaves() -> Change:
    return Change("DELETE", MEMBERS, ("1", BOB, "none"), None, 0)


def joins() -> Change:
    return Change("INSERT", MEMBERS, None, ("1", BOB, "none"), 0)
