"""Several Valkeys that are one Redis: a primary and its replica under three Sentinels, and a cluster of three nodes."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.crc import key_slot

from realtime_bridge.dev.engines import EmbeddedValkey
from realtime_bridge.dev.processes import reserve_port
from tests.services import eventually, running

SERVICE: Final = "bridge"
NOTICE_MS: Final = 1000
"""After so long without an answer a primary is given up."""
_SLOTS: Final = 16384
_REPLICAS: Final = "on >replicas-only +psync +replconf +ping"


async def ask(server: EmbeddedValkey, *command: str | int | bytes) -> Any:
    """What a server answers to one command."""
    async with Redis(port=server.port) as redis:
        return await redis.execute_command(*command)  # type: ignore[no-untyped-call]


async def replicated(primary: EmbeddedValkey) -> None:
    """Wait until a replica has all that its primary has acknowledged."""
    assert await ask(primary, "WAIT", 1, 10_000) == 1


async def is_primary(server: EmbeddedValkey) -> bool:
    return bool((await ask(server, "ROLE"))[0] == b"master")


async def is_linked(replica: EmbeddedValkey) -> bool:
    """Whether a replica is told all that its primary has."""
    return bool((await ask(replica, "INFO", "replication"))["master_link_status"] == "up")


async def shut_out_replicas(primary: EmbeddedValkey) -> None:
    """Let nothing reach a primary's replicas any more, though it goes on to acknowledge."""
    await ask(primary, "ACL", "SETUSER", "replica", "off")
    await ask(primary, "CLIENT", "KILL", "TYPE", "replica")


class Replicating(EmbeddedValkey):
    """A server that can be a primary or its replica, and whose replicas can be shut out."""

    def __init__(self, options: dict[str, str] | None = None) -> None:
        login = {"user": f"replica {_REPLICAS}", "masteruser": "replica", "masterauth": "replicas-only"}
        super().__init__(options={"repl-diskless-sync-delay": "0", **login, **(options or {})})


class Sentinel(EmbeddedValkey):
    """Watches over one primary, with others of its kind."""

    def __init__(self, primary: EmbeddedValkey) -> None:
        super().__init__()
        self._primary = primary

    def _prepare(self) -> None:
        super()._prepare()
        (self.directory / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary.port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {NOTICE_MS}\n"
            f"sentinel failover-timeout {SERVICE} 6000\n"
        )

    def _command(self) -> Sequence[str | Path]:
        return [self._program, "sentinel.conf", "--sentinel"]


class Sentinels:
    """A primary, its replica, and three Sentinels who know of each other."""

    def __init__(self, primary: Replicating, replica: Replicating, watchers: Sequence[Sentinel]) -> None:
        self.primary = primary
        self.replica = replica
        self.watchers = watchers

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(f'127.0.0.1:{watcher.port}' for watcher in self.watchers)}/{SERVICE}"

    async def is_ready(self) -> bool:
        """Whether a failover would succeed."""
        return await is_linked(self.replica) and all([await self._knows_all(watcher) for watcher in self.watchers])

    async def _knows_all(self, watcher: Sentinel) -> bool:
        state = await ask(watcher, "SENTINEL MASTER", SERVICE)
        return bool((state["num-other-sentinels"], state["num-slaves"]) == (len(self.watchers) - 1, 1))


@contextmanager
def sentinels() -> Iterator[Sentinels]:
    """See `Sentinels`; wait until it `is_ready` before anything of it fails."""
    with ExitStack() as stack:
        primary = stack.enter_context(running(Replicating()))
        replica = stack.enter_context(running(Replicating({"replicaof": f"127.0.0.1 {primary.port}"})))
        watchers = [stack.enter_context(running(Sentinel(primary))) for _ in range(3)]
        yield Sentinels(primary, replica, watchers)


class ClusterNode(Replicating):
    """A node of a cluster, with slots of its own or as a replica."""

    def __init__(self) -> None:
        self._bus = reserve_port()
        self.bus_port: int = self._bus.getsockname()[1]
        options = {"cluster-enabled": "yes", "cluster-node-timeout": str(NOTICE_MS), "cluster-port": str(self.bus_port)}
        super().__init__(options)

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)
        self._bus.close()


class Cluster:
    """Three nodes that share the slots, and a replica for one of them.

    Attributes:
        primary: of the nodes, the one that has the namespace.
        replica: takes over from it.
    """

    def __init__(self, nodes: Sequence[ClusterNode], replica: ClusterNode, namespace: str) -> None:
        self.nodes = nodes
        self.slot = key_slot(f"{{{namespace}}}:".encode())
        self.primary = nodes[self.slot * len(nodes) // _SLOTS]
        self.replica = replica

    @property
    def others(self) -> Sequence[ClusterNode]:
        """The nodes that have other slots."""
        return [node for node in self.nodes if node is not self.primary]

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes)}"

    async def make(self) -> None:
        """Have the nodes meet and share the slots, and wait until they all agree."""
        for number, node in enumerate(self.nodes):
            first, after = (-(-_SLOTS * part // len(self.nodes)) for part in (number, number + 1))
            await ask(node, "CLUSTER ADDSLOTSRANGE", first, after - 1)
            await ask(self.replica, "CLUSTER MEET", "127.0.0.1", node.port, node.bus_port)
        await eventually(self._all_agree, 30)
        await ask(self.replica, "CLUSTER REPLICATE", await ask(self.primary, "CLUSTER MYID"))
        await eventually(lambda: is_linked(self.replica), 30)
        await eventually(self._all_know_the_replica, 30)

    async def move_to(self, target: ClusterNode) -> None:
        """Move the namespace's slot, with all that is in it, to another node."""
        source_id, target_id = await ask(self.primary, "CLUSTER MYID"), await ask(target, "CLUSTER MYID")
        await ask(target, "CLUSTER SETSLOT", self.slot, "IMPORTING", source_id)
        await ask(self.primary, "CLUSTER SETSLOT", self.slot, "MIGRATING", target_id)
        while keys := await ask(self.primary, "CLUSTER GETKEYSINSLOT", self.slot, 100):
            await ask(self.primary, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for node in (target, self.primary, *self.others):
            await ask(node, "CLUSTER SETSLOT", self.slot, "NODE", target_id)

    async def _all_agree(self) -> bool:
        infos = [await ask(node, "CLUSTER INFO") for node in (*self.nodes, self.replica)]
        return all((i["cluster_state"], i["cluster_known_nodes"]) == ("ok", str(len(infos))) for i in infos)

    async def _all_know_the_replica(self) -> bool:
        answers = [await ask(node, "CLUSTER SLOTS") for node in self.nodes]
        return all(any(len(entry) > 3 for entry in answer) for answer in answers)


@contextmanager
def cluster(namespace: str) -> Iterator[Cluster]:
    """See `Cluster`; `make` it before it is used."""
    with ExitStack() as stack:
        *nodes, replica = [stack.enter_context(running(ClusterNode())) for _ in range(4)]
        yield Cluster(nodes, replica, namespace)
