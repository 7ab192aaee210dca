"""The hub's promises, with the real broker in memory, the real policies, and sinks that write down what they get."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import pytest

from realtime_bridge.broker.base import SIGHT_SECONDS, Sight
from realtime_bridge.change import ABSENT, Body, Change, Control, Entry, Image, Position, ResyncReason
from realtime_bridge.errors import BadRequestError, TooManyRequestsError
from realtime_bridge.filters import parse_filter
from realtime_bridge.hub import breath, following, settler
from realtime_bridge.hub.base import Encoding
from realtime_bridge.hub.fan_out import Reload, runs
from realtime_bridge.hub.settler import user_of
from realtime_bridge.hub.standing import NOWHERE, Altered
from realtime_bridge.hub.subscription import LOAD_SECONDS, UNKNOWN, State, Subscription, form_of
from realtime_bridge.hub.window import MESSAGES_KEPT, Prepared
from realtime_bridge.policy.base import Member, Reloaded, Verdict
from realtime_bridge.policy.engine import PolicyEngine
from realtime_bridge.transports.requests import Interest
from realtime_bridge.transports.websocket import NativeSocket, WebSocketEndpoint
from realtime_bridge.wire.native import Form, change_message
from tests.hubs import (
    ANN,
    BOB,
    CAL,
    NOTES,
    POSTS,
    RELATIONS,
    RULE,
    HubWorld,
    Message,
    Reader,
    claims,
    hub_of,
    insert,
    passes,
    poll,
    relation,
    row,
    running,
)
from tests.services import eventually


@pytest.fixture
def breathless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is given back wherever it may be given back."""
    monkeypatch.setattr(breath, "HOLD_SECONDS", -1.0)


# -- any interleaving --------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """Something that told a reader a position, or a change, or both."""

    kind: str
    position: str
    team: str
    stands: int  # the hub's number when it was written
    table: str = ""


@dataclass
class Record:
    """All that one subscription was told, from its start."""

    user: str
    start: int
    tables: Sequence[str]
    mood: str | None = None
    lines: list[Line] = field(default_factory=list)

    @property
    def position(self) -> str | None:
        return self.lines[-1].position if self.lines else None

    def note(self, message: Message, team: str, stands: int) -> None:
        table = message.get("table", "")
        table = f"{message['schema']}.{table}" if "schema" in message else table
        self.lines.append(Line(message["type"], message["position"], team, stands, table))

    def expected(self, body: Body, team: str) -> str | None:
        """The type by which this reader is told of a body; decided anew here, without policies, filters or forms."""
        if not isinstance(body, Change) or body.relation.name not in self.tables:
            return None
        old, new = self._sees(body.old, team), self._sees(body.new, team)
        return {(False, True): "INSERT", (True, True): "UPDATE", (True, False): "DELETE", (False, False): None}[
            old, new
        ]

    def _sees(self, image: Image | None, team: str) -> bool:
        return image is not None and self.user_sees(image, team) and self.mood in (None, image[3])

    def user_sees(self, image: Image, team: str) -> bool:
        return image[1] == self.user or image[2] == team

    def check(self, history: Sequence[Body]) -> None:
        """No hole before any position, nothing invisible, nothing twice, nothing out of order."""
        done: set[int] = set()
        last: Position | None = None
        for line in self.lines:
            if line.kind == "resync":
                done |= {
                    n
                    for n, body in enumerate(history[: line.stands], 1)
                    if line.table == "*" or (isinstance(body, Change) and body.relation.name == line.table)
                }
            if line.position == NOWHERE:
                continue
            position = Position.parse(line.position)
            if line.kind.isupper():
                assert line.kind == self.expected(history[position.number - 1], line.team)
                assert last is None or position.epoch != last.epoch or position.number > last.number
                last = position
                done.add(position.number)
            for number in range(self.start + 1, position.number + 1):
                assert number in done or self.expected(history[number - 1], line.team) is None, (number, line)


class Client:
    """A WebSocket's client: subscribes by its address and by messages, pings, and comes back where it was."""

    ids: tuple[str | None, ...] = (None, "sad", "both")

    def __init__(self, walk: "Walk", user: str, team: str) -> None:
        self.walk, self.user = walk, user
        self.connection, self.reader = walk.world.open(user, team)
        self.reader.on_write = self._note
        self.records: dict[str | None, Record] = {}

    @property
    def team(self) -> str:
        return str(self.connection.claims.values["team"])

    def _note(self, message: Message) -> None:
        for id_ in message.get("subscriptions", [None]):
            if id_ in self.records:
                self.records[id_].note(message, self.team, self.walk.world.hub._standing.number)

    def tell(self) -> None:
        """A pong, which tells every subscription a position."""
        position = self.walk.world.hub.position_of(self.connection)
        for id_ in self.records:
            self.records[id_].note({"type": "pong", "position": position}, self.team, 0)

    async def subscribe(self, id_: str | None, position: str | None) -> None:
        hub = self.walk.world.hub
        start = await hub.locate(position)
        if id_ in self.connection.subscriptions or self.connection not in hub.connections:
            return
        told = hub.position_at(start)
        tables = (POSTS, NOTES) if id_ is None else (POSTS,)
        mood = "sad" if id_ == "sad" else None
        begins = 0 if (position or told) == NOWHERE else Position.parse(position or told).number
        self.records[id_] = record = Record(self.user, begins, tables, mood)
        self.walk.records.append(record)
        record.note({"type": "subscribed", "position": told}, self.team, 0)
        filter_ = parse_filter("mood=eq.sad") if mood else None
        hub.subscribe(self.connection, tables, start, id_=id_, filter_=filter_)

    async def unsubscribe(self, id_: str) -> str | None:
        if not await self.walk.world.hub.unsubscribe(self.connection, id_):
            return None
        return self.records.pop(id_).position

    def leave(self) -> dict[str | None, str | None]:
        self.walk.world.hub.close(self.connection)
        self.reader.on_write = lambda message: None
        return {id_: record.position for id_, record in self.records.items()}


ALTERED: ResyncReason = "visibility_changed"


class Walk:
    """A seeded walk through what can happen to a hub."""

    def __init__(self, world: HubWorld, seed: int) -> None:
        self.world = world
        self.random = random.Random(seed)
        self.history: list[Body] = []
        self.rows: dict[tuple[str, int], Image] = {}
        self.clients: list[Client] = []
        self.records: list[Record] = []
        self.poller: Record | None = None
        self.polling = False

    async def run(self, steps: int) -> None:
        actions = [self.change] * 6 + [self.control, self.come, self.ping, self.ping, self.clog, self.clog, self.go]
        actions += [self.resubscribe, self.reauthenticate, self.poll, self.poll, self.fork]
        async with asyncio.TaskGroup() as tasks:
            for _ in range(steps):
                tasks.create_task(self.random.choice(actions)())
                await passes(self.random.choice((0, 0, 1, 3, 10, 40)))
                if self.random.random() < 0.03:
                    await asyncio.sleep(0.01)
        for client in self.clients:
            client.reader.full = False
            self.world.hub.room(client.connection)
        await self.world.settled()
        for client in self.clients:
            client.tell()
            ends = {Position.parse(record.position or "").number for record in client.records.values()}
            assert ends <= {Position.parse(self.world.hub.position).number}
        for record in self.records:
            record.check(self.history)

    def pick(self) -> Client | None:
        return self.random.choice(self.clients) if self.clients else None

    def image(self, key: int) -> Image:
        choice = self.random.choice
        return row(key, choice((ANN, BOB)), choice(("red", "blue", "none")), choice(("sad", "happy")))

    async def append(self, bodies: Sequence[Body]) -> None:
        self.history += bodies
        await self.world.append(*bodies)

    async def change(self) -> None:
        await self.append([self.a_change() for _ in range(self.random.randint(1, 6))])

    def a_change(self) -> Change:
        table, key = self.random.choice((POSTS, POSTS, NOTES)), self.random.randint(1, 8)
        old = self.rows.get((table, key))
        if old is not None and self.random.random() < 0.3:
            del self.rows[table, key]
            return Change("DELETE", RELATIONS[table], old, None, 0)
        self.rows[table, key] = new = self.image(key)
        return Change("INSERT" if old is None else "UPDATE", RELATIONS[table], old, new, 0)

    async def control(self) -> None:
        table = self.random.choice((POSTS, NOTES, "*"))
        controls = Control("resync", table, "truncated"), Control("catalog", table), Control("catalog", table, ALTERED)
        await self.append(self.random.sample(controls, self.random.randint(1, 3)))

    async def come(self) -> None:
        if len(self.clients) < 6:
            user, team = self.random.choice((ANN, BOB)), self.random.choice(("red", "blue"))
            await self.join(user, team, dict.fromkeys(Client.ids))

    async def join(self, user: str, team: str, positions: dict[str | None, str | None]) -> None:
        client = Client(self, user, team)
        self.clients.append(client)
        for id_, position in positions.items():
            await client.subscribe(id_, position)

    async def go(self) -> None:
        """Leave, and come back with every subscription's last position."""
        if client := self.pick():
            self.clients.remove(client)
            await self.join(client.user, client.team, client.leave())

    async def ping(self) -> None:
        if client := self.pick():
            client.tell()

    async def clog(self) -> None:
        if client := self.pick():
            client.reader.full = not client.reader.full
            if not client.reader.full:
                self.world.hub.room(client.connection)

    async def resubscribe(self) -> None:
        if client := self.pick():
            id_ = self.random.choice(("sad", "both"))
            position = await client.unsubscribe(id_)
            if position is not None:
                await client.subscribe(id_, position)

    async def reauthenticate(self) -> None:
        if client := self.pick():
            await self.world.hub.reauthenticate(
                client.connection, claims(client.user, self.random.choice(("red", "blue")))
            )

    async def poll(self) -> None:
        """The next poll of one reader that does nothing else."""
        if self.poller is None:
            self.poller = Record(BOB, self.world.hub._standing.number, (POSTS, NOTES))
            self.poller.lines.append(Line("ready", self.world.hub.position, "red", 0))
            self.records.append(self.poller)
        if self.polling:
            return
        self.polling, generation = True, self.world.hub._standing.generation
        answer = await poll(self.world, BOB, self.poller.position, limit=self.random.choice((1, 3, 500)))
        # The number may have been cut back since the answer was written; what its reader reads then has not.
        standing = self.world.hub._standing
        stands = standing.number if standing.generation == generation else len(self.history)
        for message in answer["messages"]:
            self.poller.note(message, "red", stands)
        self.poller.lines.append(Line("answer", answer["position"], "red", 0))
        self.polling = False

    async def fork(self) -> None:
        """Lose the newest entries; the source brings them again."""
        if self.random.random() < 0.4:
            number = self.random.randint(max(0, len(self.history) - 12), len(self.history))
            self.world.broker.fork(max(number, self.world.broker._first - 1))
            lost = self.history[self.world.broker._number :]
            await self.world.append(*lost)


@pytest.mark.parametrize("hold_seconds", [-1.0, 0.005], ids=["breathless", "calm"])
@pytest.mark.parametrize("seed", range(10))
async def test_whatever_happens_no_position_passes_a_hole(
    seed: int, hold_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breath, "HOLD_SECONDS", hold_seconds)
    resync_seconds = 0.02 * (seed % 3)
    async with running(history_size=120, window_size=25, resync_seconds=resync_seconds) as world:
        world.broker.batch = 1 + seed % 5
        await Walk(world, seed).run(250)


# -- positions ---------------------------------------------------------------------------------------------------------


async def test_a_reader_that_is_owed_a_resync_is_told_no_position_that_would_hide_it() -> None:
    async with running(resync_seconds=600) as world:
        connection, reader = await world.connect()
        await world.settled()
        await world.hub.reauthenticate(connection, claims(team="blue"))
        await eventually(lambda: reader.resyncs == ["visibility_changed"])
        await world.hub.reauthenticate(connection, claims(team="red"))
        (subscription,) = connection.subscriptions.values()
        await eventually(lambda: subscription.state is State.HELD)
        assert world.hub.position_of(connection) == NOWHERE
        _, back = await world.connect(position=NOWHERE)
        await eventually(lambda: back.resyncs == ["history_gone"])


async def test_where_a_gone_position_begins_is_told_as_nowhere_until_its_resync() -> None:
    async with running() as world:
        start = await world.hub.locate("gone-7")
        assert world.hub.position_at(start) == NOWHERE
        answer = await poll(world, ANN, "gone-7")
        assert [m["reason"] for m in answer["messages"]] == ["history_gone"]
        assert answer["position"] == world.hub.position


async def test_a_subscription_ahead_of_this_process_lends_its_position_to_no_other() -> None:
    async with running() as world:
        connection, _ = await world.connect()
        await world.settled()
        epoch = world.hub.position.rpartition("-")[0]
        ahead = world.hub.subscribe(
            connection, (POSTS,), (await world.hub.locate(None))._replace(number=7), id_="ahead"
        )
        await eventually(lambda: ahead.state is State.AHEAD)
        assert world.hub.position_of(connection) == f"{epoch}-0"
        alone, _ = world.open()
        start = (await world.hub.locate(None))._replace(number=7)
        other = world.hub.subscribe(alone, (POSTS,), start)
        await eventually(lambda: other.state is State.AHEAD)
        assert world.hub.position_of(alone) == f"{epoch}-7"
        await world.append(*(insert(n) for n in range(1, 10)))
        await world.settled()
        assert ahead.state is State.AT_END


@pytest.mark.usefixtures("breathless")
async def test_who_falls_behind_in_a_fan_out_keeps_its_position_until_what_is_pending_is_written() -> None:
    async with running() as world:
        readers = [await world.connect() for _ in range(5)]
        await world.settled()
        start = world.hub.position
        told: set[str] = set()
        resync = Control("resync", POSTS, "truncated")
        await world.append(insert(1), insert(2), resync)
        while not any(reader.messages for _, reader in readers):
            told |= {world.hub.position_of(connection) for connection, _ in readers}
            await passes(1)
        assert told == {start}
        await world.settled()
        assert all(reader.keys == [1, 2] and reader.resyncs == ["truncated"] for _, reader in readers)


@pytest.mark.parametrize("keeps", [True, False], ids=["cut back", "lost"])
async def test_a_start_that_was_located_before_the_history_was_cut_is_a_resync(keeps: bool) -> None:
    async with running() as world:
        await world.append(*(insert(n) for n in range(1, 10)))
        await world.settled()
        start = await world.hub.locate(None)
        epoch = "fork" if keeps else "other"
        world.broker.lose(epoch, 4)
        await (world.hub._following._fork if keeps else world.hub._following._lost)(epoch, 4)
        connection, reader = world.open()
        assert world.hub.position_at(start) == NOWHERE
        world.hub.subscribe(connection, (POSTS,), start)
        await eventually(lambda: reader.resyncs == ["history_gone"])
        assert reader.messages[0]["position"] == f"{epoch}-4"


@pytest.mark.usefixtures("breathless")
async def test_who_comes_while_a_loss_is_told_is_told_as_well() -> None:
    async with running() as world:
        await world.append(*(insert(n) for n in range(1, 10)))
        await world.settled()
        for _ in range(20):
            await world.connect()
        await world.settled()
        async with asyncio.TaskGroup() as tasks:
            world.broker.lose("other", 4)
            tasks.create_task(world.hub._following._lost("other", 4))
            await passes(10)
            assert world.hub.position.endswith("-9")
            _, reader = await world.connect()
        await eventually(lambda: reader.resyncs == ["history_gone"])
        assert reader.messages[0]["position"] == "other-4"


async def test_what_a_fork_cut_off_is_told_to_whoever_saw_it_where_it_will_not_come_again() -> None:
    async with running(replays=False) as world:
        _, present = await world.connect()
        await world.append(insert(1), insert(2))
        await world.settled()
        before = world.hub.position
        await world.append(insert(3))
        await world.settled()
        beyond = world.hub.position
        world.broker.fork(2)
        await world.settled()
        await world.append(insert(4))
        await world.settled()
        assert (present.keys, present.resyncs) == ([1, 2, 3, 4], ["history_gone"])
        for position, resyncs in ((before, []), (beyond, ["history_gone"])):
            _, back = await world.connect(position=position)
            await world.settled()
            assert back.resyncs == resyncs


async def test_a_resync_does_not_stand_for_what_comes_after_a_fork_under_the_same_numbers() -> None:
    async with running() as world:
        await world.append(*(insert(n) for n in range(1, 6)))
        await world.settled()
        connection, reader = await world.connect(position=NOWHERE)
        await world.settled()
        reader.full = True
        await world.append(insert(6))
        await eventually(lambda: world.hub.behind() == 1)
        world.broker.fork(2)
        await world.append(*(insert(n) for n in range(11, 14)))
        await eventually(lambda: world.hub.position == "epoch1-5")
        reader.full = False
        world.hub.room(connection)
        await world.settled()
        assert (reader.resyncs, reader.keys) == (["history_gone"], [6, 11, 12, 13])


@pytest.mark.usefixtures("breathless")
async def test_a_pong_in_a_fan_out_does_not_fall_behind_the_change_before_it() -> None:
    async with running() as world:
        readers = [await world.connect() for _ in range(20)]
        await world.settled()
        start = world.hub.position
        await world.append(insert(1))
        seen = 0
        while world.hub.position == start:
            for connection, reader in readers:
                if reader.messages:
                    seen += 1
                    assert world.hub.position_of(connection) == reader.messages[-1]["position"]
            await passes(1)
        assert seen


async def test_what_is_appended_while_it_follows_anew_makes_no_history_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as world:
        _, reader = await world.connect()
        await world.append(insert(1))
        await world.settled()
        read = world.broker.read

        async def read_late(after: int, *, limit: int = 500, max_bytes: int = 1 << 20) -> list[Entry]:
            monkeypatch.setattr(world.broker, "read", read)
            await world.append(insert(3))
            return await read(after, limit=limit)

        monkeypatch.setattr(world.broker, "read", read_late)
        world.broker.cuts_off = True
        await world.append(insert(2))
        await eventually(lambda: reader.keys == [1, 2, 3])
        assert (reader.resyncs, world.broker.read) == ([], read)


async def test_what_is_proven_is_taken_back_where_a_fork_cut_it_off() -> None:
    async with running() as world:
        await world.broker.append(world.token, [insert(1), insert(2)], proven_until=1000.0)
        await eventually(lambda: world.hub.complete_until == 1000.0)
        world.broker.fork(1)
        await eventually(lambda: world.hub.complete_until is None)


async def test_a_poll_that_is_not_at_the_end_claims_no_completeness() -> None:
    async with running(window_size=2) as world:
        await world.broker.append(world.token, [insert(n) for n in range(1, 10)], proven_until=1000.0)
        await world.settled()
        epoch = world.hub.position.rpartition("-")[0]
        world.broker.down = True
        answer = await poll(world, ANN, f"{epoch}-1")
        assert (answer["messages"], answer["position"], answer["complete_until"]) == ([], f"{epoch}-1", None)
        world.broker.down = False
        answer = await poll(world, ANN, f"{epoch}-1", wait=5)
        assert (len(answer["messages"]), answer["complete_until"]) == (8, "1970-01-01T00:16:40.000Z")


def test_policies_are_read_again_before_the_transaction_in_which_they_may_have_changed() -> None:
    def entry(number: int, time: int, body: Body) -> Prepared:
        return Prepared(Entry(number, str(number), str(number - 1), replace(body, commit_time=time)))

    before, first, catalog, last, after = (
        entry(1, 10, insert(1)),
        entry(2, 20, insert(2)),
        entry(3, 20, Control("catalog", POSTS)),
        entry(4, 20, insert(4)),
        entry(5, 30, insert(5)),
    )
    assert list(runs([before, first, catalog, last, after])) == [
        [before],
        Reload(POSTS, 2),
        [first, catalog, last, after],
    ]


# -- who comes and goes ------------------------------------------------------------------------------------------------


class SlowPolicy(PolicyEngine):
    """Takes its time to learn of members."""

    async def load(self, members: Sequence[Member]) -> None:
        await passes(20)
        await super().load(members)


async def test_who_leaves_before_it_is_settled_is_remembered_as_nothing() -> None:
    async with running(SlowPolicy([POSTS, NOTES], ["authenticated"], {POSTS: RULE, NOTES: RULE})) as world:
        connection, _ = await world.connect(CAL)
        await passes(10)
        world.hub.close(connection)
        await passes(50)
        start = await world.hub.position_for(claims(CAL))
        await world.append(insert(1, CAL))
        await world.settled()
        _, reader = await world.connect(CAL, position=start)
        await world.settled()
        assert (reader.keys, reader.resyncs) == ([1], [])


async def test_a_connection_lost_while_its_new_token_waits_leaves_no_member_behind() -> None:
    async with running() as world:
        other, quiet = await world.connect()
        connection, _ = await world.connect()
        await world.settled()
        async with asyncio.TaskGroup() as tasks, world.held():
            tasks.create_task(world.hub.reauthenticate(connection, claims(team="blue")))
            await passes(3)
            world.hub.close(connection)
        assert world.policy.present == 1
        await world.append(insert(1))
        await world.settled()
        assert quiet.keys == [1]
        world.hub.close(other)


async def test_whoever_begins_is_known_before_it_is_told_where() -> None:
    async with running() as world:
        position = world.hub.position_at(await world.hub.locate(None, claims(CAL)))
        await world.append(insert(1, CAL), insert(2, CAL))
        await world.settled()
        _, reader = await world.connect(CAL, position)
        await world.settled()
        assert (reader.resyncs, reader.keys) == ([], [1, 2])


async def test_whoever_reads_on_is_not_decided_by_what_has_expired() -> None:
    async with running() as world:
        connection, present = await world.connect()
        await world.settled()
        position = world.hub.position
        await world.append(insert(1))
        await world.settled()
        learned = connection.member.learned
        world.policy._members.expire(connection.member, -1)
        _, reader = await world.connect(position=position)
        await world.settled()
        await world.append(insert(2))
        await world.settled()
        assert (present.keys, reader.keys, connection.member.learned) == ([1, 2], [1, 2], learned + 1)


async def test_whoever_comes_back_with_another_token_is_told_though_nothing_has_happened() -> None:
    async with running() as world:
        connection, _ = await world.connect()
        await world.append(insert(1))
        await world.settled()
        position = world.hub.position_of(connection)
        world.hub.close(connection)
        world.broker._clock = lambda: time.monotonic() + 2 * SIGHT_SECONDS
        start = await world.hub.locate(None, claims(team="blue"))
        connection, present = world.open(team="blue")
        world.hub.subscribe(connection, [POSTS], start)
        await world.settled()
        for _ in range(2):
            connection, reader = await world.connect(position=position, team="blue")
            await world.settled()
            assert (reader.resyncs, reader.keys) == (["visibility_changed"], [])
        told = world.hub.position_of(connection)
        _, again = await world.connect(position=told, team="blue")
        await world.settled()
        await world.append(insert(2))
        await world.settled()
        assert (again.resyncs, again.keys, present.resyncs) == ([], [2], [])


async def test_another_token_of_the_user_costs_nobody_a_resync_who_begins_or_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settler, "REMIND_SECONDS", 0.001)
    async with running() as world:
        readers = []
        for team in ("red", "blue"):
            start = await world.hub.locate(None, claims(team=team))
            connection, reader = world.open(team=team)
            world.hub.subscribe(connection, [POSTS], start)
            readers.append(reader)
        await world.settled()
        for number in (1, 2):
            world.broker.recalled.clear()
            await eventually(lambda: len({s.digest for s in world.broker.recalled if s.table == POSTS}) == 2)
            await world.append(insert(number))
            await world.settled()
        assert [(reader.keys, reader.resyncs) for reader in readers] == [([1, 2], [])] * 2


async def seen_by_another_token(world: HubWorld, user: str) -> Sight:
    """What another process tells of a user."""
    await poll(world, ANN, world.hub.position)
    rights = next(sight.digest for sight in world.broker.recalled if sight.table == POSTS).partition(".")[0]
    return Sight(user_of(claims(user)), POSTS, f"{rights}.another.")


async def test_rights_that_changed_are_told_to_whoever_comes_from_before() -> None:
    async with running() as world:
        await world.append(insert(1))
        _, present = await world.connect()
        await world.settled()
        position = world.hub.position
        await world.append(insert(2), Control("catalog", POSTS, "visibility_changed"), insert(3))
        await world.settled()
        _, back = await world.connect(position=position)
        _, later = await world.connect(position=world.hub.position)
        await world.settled()
        for reader in (present, back):
            assert (reader.keys[-1], reader.resyncs) == (2, ["visibility_changed"])  # and 3 is in what it reads
        assert (later.keys, later.resyncs) == ([], [])


async def test_rights_that_changed_are_told_once_to_whoever_was_there_when_they_were_found() -> None:
    async with running() as world:
        connection, present = await world.connect()
        await world.settled()
        now = asyncio.get_running_loop().time()
        world.hub._standing.altered[POSTS] = Altered(now)
        connection.subscriptions[None].told[POSTS] = now
        _, joining = await world.connect(position=world.hub.position)
        await world.settled()
        await world.append(Control("catalog", POSTS, "visibility_changed"), insert(1))
        await world.settled()
        assert (present.keys, present.resyncs) == ([1], [])
        assert joining.resyncs == ["visibility_changed"]


async def test_a_poll_is_told_once_that_its_user_sees_otherwise_though_nothing_follows() -> None:
    async with running() as world:
        await world.append(insert(1))
        await world.settled()
        position, epoch = world.hub.position, world.broker._epoch
        await world.broker.recall(epoch, [await seen_by_another_token(world, BOB)])
        told: list[str] = []
        for _ in range(3):
            answer = await poll(world, BOB, position)
            told += [message["reason"] for message in answer["messages"]]
            position = answer["position"]
        assert told == ["visibility_changed"]
        await world.append(insert(2, BOB))
        await world.settled()
        assert [m["record"]["id"] for m in (await poll(world, BOB, position))["messages"]] == [2]


async def test_who_may_still_be_served_elsewhere_by_another_token_is_told_so_here() -> None:
    async with running() as world:
        await world.append(insert(1))
        await world.settled()
        await world.broker.recall(world.broker._epoch, [await seen_by_another_token(world, BOB)])
        await poll(world, BOB, world.hub.position)
        await world.append(insert(2), insert(3))
        await world.settled()
        told = [(await poll(world, BOB, world.hub.position))["messages"] for _ in range(2)]
        assert [[message["reason"] for message in messages] for messages in told] == [["visibility_changed"]] * 2


async def test_newer_claims_come_to_a_member_that_is_known_though_all_were_forgotten_meanwhile() -> None:
    async with running() as world:
        connection, reader = await world.connect()
        await world.settled()
        async with world.held():
            changing = asyncio.create_task(world.hub.reauthenticate(connection, claims(ANN, "blue")))
            await passes(20)
            await world.hub._fan_out.renew(1)
        await changing
        await world.settled()
        await world.append(insert(1))
        await world.settled()
        assert (reader.resyncs, reader.keys) == (["visibility_changed"], [1])


async def test_after_a_loss_nothing_is_compared_with_numbers_from_before_it() -> None:
    async with running() as world:
        await world.append(*(insert(n) for n in range(1, 10)))
        await world.settled()
        await world.hub.position_for(claims(CAL))
        connection, reader = await world.connect(CAL)
        world.broker.lose("other", 4)
        await world.hub._following._lost("other", 4)
        await eventually(lambda: reader.resyncs == ["history_gone"])
        assert (await poll(world, CAL, world.hub.position))["messages"] == []
        assert connection.member.sights[POSTS].since == 4


async def told_by(reader: Reader, world: HubWorld) -> list[tuple[str, str]]:
    """The table and position of each resync that a reader has been sent."""
    await world.settled()
    return [(message["table"], message["position"]) for message in reader.messages if message["type"] == "resync"]


async def test_whoever_comes_back_with_the_position_of_a_resync_is_not_told_again_and_misses_nothing() -> None:
    """Told because of an entry, or because of what another process has told the broker of its user."""
    async with running() as world:
        position = world.hub.position
        await world.append(
            insert(1), Control("catalog", POSTS, "visibility_changed"), insert(2, table=NOTES), insert(3)
        )
        _, reader = await world.connect(position=position, tables=(POSTS, NOTES))
        [(_, by_entry)] = await told_by(reader, world)
        assert reader.keys == [1, 2]
        _, back = await world.connect(position=by_entry, tables=(POSTS, NOTES))
        await world.settled()
        assert (back.resyncs, back.keys) == ([], [2, 3])

        position = world.hub.position
        await world.append(insert(4, BOB, table=NOTES))
        await world.settled()
        await world.broker.recall(world.broker._epoch, [await seen_by_another_token(world, BOB)])
        _, reader = await world.connect(BOB, position, tables=(POSTS, NOTES))
        [(_, by_sight)] = await told_by(reader, world)
        _, back = await world.connect(BOB, by_sight, tables=(POSTS, NOTES))
        await world.settled()
        assert (back.resyncs, back.keys, reader.keys) == ([], [4], [4])


async def test_of_several_resyncs_only_the_position_of_the_last_says_that_all_were_told() -> None:
    async with running() as world:
        position = world.hub.position
        await world.append(insert(1))
        await world.settled()
        others = [await seen_by_another_token(world, BOB)]
        others.append(others[0]._replace(table=NOTES))
        await world.broker.recall(world.broker._epoch, others)
        _, reader = await world.connect(BOB, position, tables=(POSTS, NOTES))
        first, last = await told_by(reader, world)
        for position, tables in ((first[1], {POSTS, NOTES}), (last[1], set())):
            _, back = await world.connect(BOB, position, tables=(POSTS, NOTES))
            assert {table for table, _ in await told_by(back, world)} == tables


FITTING = parse_filter("mood=eq.sad")
MOODLESS = replace(RELATIONS[POSTS], columns=RELATIONS[POSTS].columns[:3])


def moodless(key: int) -> Change:
    return Change("INSERT", MOODLESS, None, row(key)[:3], 0)


async def test_a_filter_that_can_hold_no_more_ends_its_subscription_once_and_no_other() -> None:
    async with running() as world:
        connection, reader = world.open()
        start = await world.hub.locate(None)
        world.hub.subscribe(connection, [POSTS], start, id_="sad", filter_=FITTING)
        world.hub.subscribe(connection, [POSTS], start, id_="all")
        await world.append(insert(1), moodless(2), moodless(3))
        await world.settled()
        assert [message["id"] for message in reader.messages if message["type"] == "error"] == ["sad"]
        assert [m["record"]["id"] for m in reader.messages if "sad" in m.get("subscriptions", ())] == [1]
        assert [m["record"]["id"] for m in reader.messages if "all" in m.get("subscriptions", ())] == [1, 2, 3]
        assert (reader.resyncs, reader.closed, list(connection.subscriptions)) == ([], [], ["all"])


async def test_what_the_address_asked_for_with_such_a_filter_ends_the_connection_before_the_change() -> None:
    async with running() as world:
        connection, reader = world.open()
        world.hub.subscribe(connection, [POSTS], await world.hub.locate(None), filter_=FITTING)
        await world.append(insert(1), moodless(2))
        await eventually(lambda: reader.closed == [4400])
        assert (reader.keys, reader.resyncs) == ([1], [])
        assert Position.parse(world.hub.position_of(connection)).number == 1


async def test_a_poll_with_such_a_filter_is_answered_up_to_there_and_refused_from_there() -> None:
    async with running() as world:
        position = world.hub.position
        await world.append(insert(1), moodless(2))
        await world.settled()
        answer = await poll(world, ANN, position, filter_=FITTING)
        assert [message["record"]["id"] for message in answer["messages"]] == [1]
        with pytest.raises(BadRequestError, match="no column mood"):
            await poll(world, ANN, answer["position"], filter_=FITTING, wait=60)


async def test_polls_of_no_table_leave_nothing_counted() -> None:
    async with running() as world:
        subscriptions = []
        for _ in range(2):
            connection, _ = world.open()
            subscriptions.append(world.hub.subscribe(connection, (), await world.hub.locate(None)))
        await world.settled()
        for subscription in subscriptions:
            world.hub.close(subscription.connection)
        assert not world.hub._per_user


async def test_links_without_a_name_count_as_connections() -> None:
    async with running(max_connections=2) as world:
        endpoint = WebSocketEndpoint(world.hub, None, lambda *_: True, lambda _: None, 65_536)  # type: ignore[arg-type]
        start = await world.hub.locate(None)
        sockets = [NativeSocket(endpoint, Reader(), Interest((POSTS,)), start, None) for _ in range(2)]
        with pytest.raises(TooManyRequestsError):
            world.hub.admit(None)
        sockets[0].lost()
        world.hub.admit(None)
        sockets[1]._open(claims())
        assert (len(world.hub.strangers), len(world.hub.connections)) == (0, 1)
        sockets[1].lost()


@pytest.mark.usefixtures("breathless")
async def test_nothing_is_sent_for_a_subscription_after_it_has_ended() -> None:
    async with running() as world:
        readers = [await world.connect(id_="a") for _ in range(5)]
        await world.settled()
        position = world.hub.position
        await world.append(insert(1))
        await world.fanning_out()
        for connection, reader in readers:
            assert await world.hub.unsubscribe(connection, "a")
            reader.messages.clear()
            world.hub.subscribe(connection, (POSTS,), await world.hub.locate(position), id_="a")
        await world.settled()
        assert [reader.keys for _, reader in readers] == [[1]] * 5


# -- faults ------------------------------------------------------------------------------------------------------------


class FaultyPolicy(PolicyEngine):
    """Fails at one row, as a fault of ours would."""

    poison = "13"

    async def audience(self, entries: Sequence[Entry]) -> Any:
        assert not any(isinstance(e.body, Change) and e.body.new and e.body.new[0] == self.poison for e in entries)
        return await super().audience(entries)

    async def verdicts(self, entries: Sequence[Entry], member: Any) -> list[Verdict]:
        await self.audience(entries)
        return await super().verdicts(entries, member)


def faulty() -> FaultyPolicy:
    return FaultyPolicy([POSTS, NOTES], ["authenticated"], {POSTS: RULE, NOTES: RULE})


async def test_an_entry_that_cannot_be_decided_at_all_is_told_once_and_passed() -> None:
    async with running(faulty()) as world:
        _, reader = await world.connect()
        await world.settled()
        start = world.hub.position
        await world.append(insert(1))
        await world.settled()
        await world.append(insert(13))
        await world.settled()
        await world.append(insert(2))
        await world.settled()
        assert (reader.keys, reader.resyncs) == ([1, 2], ["history_gone"])
        _, back = await world.connect(position=start)
        await world.settled()
        assert (back.resyncs, back.closed) == (["history_gone"], [])
        answer = await poll(world, ANN, start)
        assert [m["type"] for m in answer["messages"]] == ["resync"]


async def test_an_entry_that_cannot_be_read_is_told_once_and_passed() -> None:
    async with running(window_size=1) as world:
        _, reader = await world.connect()
        await world.settled()
        start = world.hub.position
        world.broker.poison = 2
        await world.append(insert(1), insert(2), insert(3))
        await world.settled()
        await world.append(insert(4))
        await world.settled()
        assert (reader.keys, reader.resyncs) == ([4], ["history_gone"])
        _, back = await world.connect(position=start)
        await world.settled()
        assert (back.resyncs, back.closed) == (["history_gone"], [])


async def test_a_hub_that_runs_again_goes_on_with_whoever_was_behind() -> None:
    async with running() as world:
        async with world.held():
            readers = [await world.connect(position=NOWHERE) for _ in range(6)]
            await passes(10)
            await world.restart()
        await eventually(lambda: all(reader.resyncs for _, reader in readers))


@pytest.mark.parametrize(("look_back", "position", "slices"), [(700, 10, 0), (200, 400, 0), (200, 150, 2)])
async def test_what_came_before_a_process_began_is_read_once_for_all_who_come_back(
    look_back: int, position: int, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_LOOK_BACK", look_back)
    async with running() as world:
        await world.append(*(insert(n, BOB if n % 2 else ANN) for n in range(1, 701)))
        await world.settled()
        policy = PolicyEngine([POSTS, NOTES], ["authenticated"], {POSTS: RULE, NOTES: RULE})
        other = await hub_of(world.broker, policy)
        running_other = world.tasks.create_task(other.run())
        await other.begun()
        readers = {ANN: Reader(), BOB: Reader()}
        for user, reader in readers.items():
            connection = other.open(reader, claims(user))
            other.subscribe(connection, [POSTS], await other.locate(f"{world.broker._epoch}-{position}"))
        await eventually(lambda: other.behind() == 0)
        assert [reader.keys for reader in readers.values()] == [
            [n for n in range(position + 1, 701) if n % 2 == odd] for odd in (0, 1)
        ]
        assert other.counters.caught_up_from_broker == slices
        for connection in tuple(other.connections):
            other.close(connection)
        running_other.cancel()


async def test_a_broker_that_does_not_answer_holds_up_only_those_who_ask_it() -> None:
    async with running(window_size=5) as world:
        await world.append(*(insert(n) for n in range(1, 21)))
        await world.settled()
        epoch = world.hub.position.rpartition("-")[0]
        world.broker.down = True
        old = [await world.connect(position=f"{epoch}-1") for _ in range(40)]
        _, recent = await world.connect(position=f"{epoch}-17")
        await passes(200)
        assert recent.keys == [18, 19, 20]
        world.broker.down = False
        await world.settled()
        assert all(reader.keys == list(range(2, 21)) for _, reader in old)


class RevokingPolicy(PolicyEngine):
    """Shows nothing any more once its policies are read again."""

    revoked = False

    async def reload(self, table: str) -> Reloaded:
        await passes(20)
        self.revoked = table != "*"
        return Reloaded()

    async def verdicts(self, entries: Sequence[Entry], member: Any) -> list[Verdict]:
        return [Verdict(False, False)] * len(entries) if self.revoked else await super().verdicts(entries, member)


async def test_what_was_decided_before_policies_changed_is_not_sent_after() -> None:
    policy = RevokingPolicy([POSTS, NOTES], ["authenticated"], {POSTS: RULE, NOTES: RULE})
    async with running(policy) as world:
        start = world.hub.position
        await world.append(insert(1))
        await world.settled()
        await world.append(Control("catalog", POSTS))
        await world.fanning_out()
        assert not policy.revoked
        _, reader = await world.connect(position=start)
        await world.settled()
        assert reader.messages == []


# -- bounds ------------------------------------------------------------------------------------------------------------


async def test_many_behind_leave_turns_to_others() -> None:
    async with running() as world:
        await world.append(*(insert(n) for n in range(1, 6)))
        await world.settled()
        written: list[int] = []
        turns = 0
        for _ in range(90):
            _, reader = await world.connect(position=NOWHERE)
            reader.on_write = lambda _: written.append(turns)
        while len(written) < 90:
            turns += 1
            await passes(1)
        assert max(map(written.count, written)) <= 8


async def test_one_long_history_leaves_turns_to_others() -> None:
    async with running(history_size=5000, window_size=5000) as world:
        start = world.hub.position
        for first in range(0, 4000, 500):
            await world.append(*(insert(n) for n in range(first, first + 500)))
        await world.settled()
        _, reader = await world.connect(position=start)
        sizes = {0}
        while len(reader.messages) < 4000:
            sizes.add(len(reader.messages))
            await passes(1)
        assert len(sizes) >= 15
        assert reader.keys == list(range(4000))


async def test_of_large_entries_no_more_is_decided_than_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as world:
        start = world.hub.position
        for n in range(1, 11):
            await world.append(insert(n, mood="x" * 40_000))
            await world.append(insert(-n, BOB, mood="x" * 40_000))
        await world.settled()
        decided = 0
        verdicts = world.policy.verdicts

        async def counted(entries: Sequence[Entry], member: Member) -> list[Verdict]:
            nonlocal decided
            decided += len(entries)
            return await verdicts(entries, member)

        monkeypatch.setattr(world.policy, "verdicts", counted)
        _, reader = await world.connect(position=start)
        await eventually(lambda: len(reader.keys) == 10)
        assert reader.keys == list(range(1, 11))
        assert decided == 20


async def test_many_polls_leave_turns_to_others() -> None:
    async with running() as world:
        start = world.hub.position
        await world.append(*(insert(n) for n in range(1, 401)))
        await world.settled()
        slices: list[int] = []
        turns = 0
        advance = world.hub._catch_up._advance

        async def counted(subscription: Subscription, most: int) -> int:
            slices.append(turns)
            return await advance(subscription, most)

        world.hub._catch_up._advance = counted  # type: ignore[method-assign]
        async with asyncio.TaskGroup() as tasks:
            polls = [tasks.create_task(poll(world, ANN, start)) for _ in range(40)]
            while not all(task.done() for task in polls):
                turns += 1
                await passes(1)
        assert all(len(task.result()["messages"]) == 400 for task in polls)
        assert max(map(slices.count, slices)) <= 8


@pytest.mark.usefixtures("breathless")
async def test_a_resync_of_many_leaves_turns_to_others() -> None:
    async with running() as world:
        readers = [await world.connect() for _ in range(50)]
        await world.settled()
        await world.append(Control("resync", "*", "truncated"))
        counts = set()
        while not all(reader.resyncs for _, reader in readers):
            counts.add(world.hub._standing.directory.count)
            await passes(1)
        assert len(counts) > 25
        await world.settled()


@pytest.mark.parametrize("is_behind", [False, True])
async def test_a_resync_since_a_time_is_for_those_who_may_have_read_the_table_later(
    is_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("came before", "came before and was told since", "came since")
    now = time.monotonic()
    since = int((time.time() - 30) * 1_000_000)
    async with running() as world:
        start = world.hub.position
        readers = {} if is_behind else {name: await world.connect() for name in names}
        await world.settled()
        async with world.held():
            await world.append(insert(1), Control("resync", POSTS, "upstream_gap", since=since), insert(2))
            readers = readers or {name: await world.connect(position=start) for name in names}
            before, told_since, _ = [s for c, _ in readers.values() for s in c.subscriptions.values()]
            before.began = told_since.began = now - 30 - LOAD_SECONDS - 1
            told_since.told[POSTS] = now
            departed: list[Subscription] = []
            depart = world.hub._standing.depart

            def departs(subscription: Subscription, number: int, state: State) -> None:
                departed.append(subscription)
                depart(subscription, number, state)

            monkeypatch.setattr(world.hub._standing, "depart", departs)
        await world.settled()
        assert [reader.resyncs for _, reader in readers.values()] == [[], ["upstream_gap"], ["upstream_gap"]]
        assert readers["came before"][1].keys == [1, 2]
        assert before not in departed, "nobody else is held up"


async def test_a_resync_is_spread_over_everybody() -> None:
    async with running() as world:
        readers = [await world.connect() for _ in range(60)]
        await world.settled()
        await world.append(Control("resync", POSTS, "truncated"))
        await world.settled()
        waits = [reader.messages[0]["after_ms"] for _, reader in readers[:20]]
        assert max(waits) > 40  # of 120, and whoever is told first does not wait less
        assert all(reader.messages[0]["after_ms"] <= 120 for _, reader in readers)


async def test_a_slow_connection_owes_one_slice_however_many_subscriptions_it_has() -> None:
    async with running() as world:
        start = world.hub.position
        await world.append(insert(1))
        await world.settled()
        connection, reader = world.open()
        reader.on_write = lambda message: setattr(reader, "full", True)
        for i in range(50):
            world.hub.subscribe(connection, (POSTS,), await world.hub.locate(start), id_=str(i))
        await eventually(lambda: all(s.state is not State.BEHIND for s in connection.subscriptions.values()))
        assert len(reader.messages) == 1
        reader.on_write = lambda message: None
        reader.full = False
        world.hub.room(connection)
        await world.settled()
        assert sorted(i for m in reader.messages for i in m["subscriptions"]) == sorted(map(str, range(50)))


def test_clients_names_and_columns_do_not_fill_the_window() -> None:
    change = insert(1)
    prepared = Prepared(Entry(1, "b", "a", change))
    for i in range(1000):
        message = prepared.message("abcd", Form.INSERT, Encoding.JSON, ("mood",), (f"id{i}", "é"))
        assert message == change_message(change, Form.INSERT, "abcd-1", columns=("mood",), ids=(f"id{i}", "é"))
        prepared.message("abcd", Form.INSERT, Encoding.FRAME, (f"column{i}",))
    assert len(prepared._messages) <= MESSAGES_KEPT


@pytest.mark.parametrize("form", Form)
def test_a_change_that_was_read_back_says_so_in_every_form(form: Form) -> None:
    change = Change("UPDATE", relation(POSTS), row(1), row(1, BOB), 0)
    plain = orjson.loads(change_message(change, form, "abcd-1"))
    repaired = orjson.loads(change_message(replace(change, repaired=True), form, "abcd-1"))
    assert "repaired" not in plain
    assert repaired == {**plain, "repaired": True}


def test_a_row_that_may_enter_without_all_of_its_columns_is_not_known() -> None:
    keyed = relation(POSTS, full=False)
    change = Change("UPDATE", keyed, None, ("1", ANN, "red", ABSENT), 0)
    assert form_of(change, None, True) is UNKNOWN
    assert form_of(change, False, True) is UNKNOWN
    assert form_of(change, True, True) is Form.UPDATE_KEY


async def test_a_row_enters_as_an_insert_whatever_else_is_known_of_what_it_was() -> None:
    keyed = relation(POSTS, full=False)

    def update(old: Image | None) -> Change:
        return Change("UPDATE", keyed, old, row(1, BOB, "red"), 0)

    async with running() as world:
        start = world.hub.position
        _, at_the_end = await world.connect()
        await world.settled()
        await world.append(update(("1", BOB, "blue", ABSENT)), update(("1", ABSENT, ABSENT, "sad")), update(None))
        await world.settled()
        _, coming_back = await world.connect(position=start)
        await world.settled()
        for reader in (at_the_end, coming_back):
            assert [(m["type"], m.get("old_record")) for m in reader.messages] == [
                ("INSERT", None),
                ("UPDATE", {"id": 1}),
                ("UPDATE", {"id": 1}),
            ]
