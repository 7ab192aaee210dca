"""The hub: follows the history and serves every connection of this process from it.

Layer: core. May import: words, broker.base, filters, policy.base, wire, hub.*.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from realtime_bridge.broker.base import Broker
from realtime_bridge.change import Position, ResyncReason
from realtime_bridge.claims import Claims
from realtime_bridge.errors import (
    BadRequestError,
    ForbiddenError,
    HistoryGoneError,
    TooManyRequestsError,
    UnavailableError,
)
from realtime_bridge.filters import Filter
from realtime_bridge.hub.base import Sink
from realtime_bridge.hub.catch_up import READERS, CatchUp
from realtime_bridge.hub.connection import Connection
from realtime_bridge.hub.fan_out import FanOut
from realtime_bridge.hub.following import Following
from realtime_bridge.hub.keepalive import Keepalive
from realtime_bridge.hub.settler import Settler
from realtime_bridge.hub.standing import NOWHERE, Counters, Standing
from realtime_bridge.hub.subscription import UNSURE, State, Subscription, check_filter
from realtime_bridge.policy.base import Member, Policy

MAX_SUBSCRIPTIONS: Final = 100
"""Per connection, as Supabase has it."""
WATCH_SECONDS: Final = 1.0
"""For how long a change of rights that nothing announces may go unnoticed."""
_SETTLE_SECONDS: Final = 5.0


class Start(NamedTuple):
    """Where a reader begins, as `Hub.locate` answers.

    Attributes:
        owed: the resync that it is sent before anything else, if any.
        generation: of the numbers when it was asked; later than that `number` may mean another entry.
        told: as in `Position`.
        fresh: it is the present, as nobody had asked for a position.
    """

    number: int
    owed: ResyncReason | None
    generation: int
    told: int = 0
    fresh: bool = False


class Hub:
    """Serves connections from the history. One per process; make it on the running loop, then `run` it.

    Args:
        tables: every table that can be subscribed to.
        send_buffer_bytes: see `BRIDGE_SEND_BUFFER_BYTES`.
        replays: the source brings what a failover of the broker has lost again, so that nobody has seen anything that
            will not come.

    Attributes:
        strangers: links whose clients have yet to say who they are; kept by the transports, counted like connections.
    """

    def __init__(
        self,
        broker: Broker,
        policy: Policy,
        *,
        tables: Collection[str],
        max_connections: int,
        max_connections_per_user: int,
        send_buffer_bytes: int,
        ping_seconds: float,
        resync_seconds: float,
        replays: bool = True,
    ) -> None:
        self.tables = tuple(tables)
        self.max_connections = max_connections
        self.max_connections_per_user = max_connections_per_user
        self.ping_seconds = ping_seconds
        self.draining = False
        self.strangers: set[object] = set()
        self._broker = broker
        self._policy = policy
        self._standing = Standing(policy, self.tables, replays)
        self.connections = self._standing.connections
        self._settler = Settler(self._standing, broker)
        self._catch_up = CatchUp(
            self._standing, broker, self._settler, slice_bytes=send_buffer_bytes, resync_seconds=resync_seconds
        )
        self._fan_out = FanOut(self._standing, self._catch_up.resume)
        self._following = Following(self._standing, broker, self._fan_out, self._catch_up)
        self._keepalive = Keepalive(self, ping_seconds)
        self._per_user: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow the history and serve, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._following.run(), name="follow")
            tasks.create_task(self._keepalive.run(), name="keepalive")
            tasks.create_task(self._watch(), name="watch")
            tasks.create_task(self._settler.work(), name="settler")
            tasks.create_task(self._settler.remind(), name="settler-reminds")
            for i in range(READERS):
                tasks.create_task(self._catch_up.work(), name=f"catch-up-{i}")

    async def begun(self) -> None:
        """Wait until the hub stands somewhere in the history."""
        await self._following.begun.wait()

    async def _watch(self) -> None:
        """Find the changes of rights that no entry announces."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if await self._policy.outdated():
                async with self._standing.turn:
                    await self._fan_out.reload("*", self._standing.number + 1)

    # -- where it stands -----------------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What the hub has done since it began."""
        return self._standing.counters

    @property
    def following(self) -> bool:
        """Whether the broker is being followed now."""
        return self._standing.following

    @property
    def complete_until(self) -> float | None:
        """Seconds since 1970 up to which nothing is missing here, or None if nothing is proven yet."""
        return self._standing.proof.until or None

    @property
    def proof_age(self) -> float | None:
        """Seconds since it was proven anew that nothing is missing here, or None if it is not proven."""
        return self._standing.proof.age(self._loop.time())

    @property
    def position(self) -> str:
        """The position up to which everything is decided: what a read of the database may start from."""
        return self._standing.position(self._standing.number)

    def position_at(self, start: Start) -> str:
        """What `locate` answered, as clients know it."""
        start = self._valid(start)
        return self._standing.position(start.number, start.told) if start.owed is None else NOWHERE

    def position_of(self, connection: Connection) -> str:
        """The position up to which every subscription of a connection was sent everything."""
        subscriptions = connection.subscriptions.values()
        if any(subscription.owed is not None for subscription in subscriptions):
            return NOWHERE
        number = connection.number(self._standing.number)
        told = {subscription.told_at(number) for subscription in subscriptions}
        if UNSURE in told:
            return self._standing.position(number, UNSURE)
        return self._standing.position(number, told.pop() if len(told) == 1 else 0)

    def at_end(self, connection: Connection) -> bool:
        """Whether every subscription of a connection is at the end."""
        return not any(True for _ in connection.behind())

    def behind(self) -> int:
        """How many subscriptions are not at the end."""
        return sum(len(c.subscriptions) for c in self.connections) - self._standing.directory.count

    async def locate(self, text: str | None, claims: Claims | None = None) -> Start:
        """Where a reader with a position (None: with none) begins, and the resync it is owed, if any.

        Of a user who begins at the present, and so is about to read, it is known by then what is seen: every change of
        that is told from then on, and none that there was not.

        Raises:
            InvalidPositionError: the text cannot be a position.
            BrokerError: it is not in the window, and the broker does not answer.
        """
        if text is None and claims is not None:
            await self._look_at(claims)
        generation = self._standing.generation
        if text is None:
            return Start(self._standing.number, None, generation, fresh=True)
        position = Position.parse(text)
        window = self._standing.window
        if position.epoch == self._standing.epoch and window.first - 1 <= position.number <= self._standing.number:
            return Start(position.number, None, generation, position.told)
        try:
            number = await self._broker.locate(position)
            if number < position.number and not self._standing.replays:
                raise HistoryGoneError("what was told beyond the fork will not be told again")
            is_same = (position.epoch, position.number) == (self._standing.epoch, number)
            return Start(number, None, generation, position.told if is_same else 0)
        except HistoryGoneError:
            return Start(self._standing.number, "history_gone", generation)

    def _valid(self, start: Start) -> Start:
        """The start itself, or, if its number has stopped being valid since, a resync."""
        generation = self._standing.generation
        return start if start.generation == generation else Start(self._standing.number, "history_gone", generation)

    # -- connections ---------------------------------------------------------------------------------------------------

    def open(self, sink: Sink, claims: Claims, *, lasting: bool = True) -> Connection:
        """A connection for verified claims. Pair with `close`. One that is not `lasting` is not pinged.

        Raises:
            TooManyRequestsError: the process or the user has too many.
            UnavailableError: the process is being stopped.
        """
        self.admit(claims)
        connection = Connection(sink, claims, self._policy.join(claims), self._loop.time(), lasting=lasting)
        self.connections.add(connection)
        if claims.subject is not None:
            self._per_user[claims.subject] += 1
        return connection

    async def position_for(self, claims: Claims) -> str:
        """The position that a user's read of the database may start from, with what it sees by then remembered.

        A reader that comes with it is told if the user sees otherwise by then.
        """
        await self._look_at(claims)
        return self.position

    async def _look_at(self, claims: Claims) -> None:
        """Have it known what a user sees, if that can be found out in a while."""
        member = self._policy.join(claims)
        try:
            await self._wait_for(member)
        finally:
            self._policy.leave(member)

    def admit(self, claims: Claims | None) -> None:
        """Whether one more connection would be taken; raises as `open` does."""
        if self.draining:
            raise UnavailableError("this server is being stopped")
        if len(self.connections) + len(self.strangers) >= self.max_connections:
            raise TooManyRequestsError("this server has too many connections")
        subject = None if claims is None else claims.subject
        if subject is not None and self._per_user[subject] >= self.max_connections_per_user:
            raise TooManyRequestsError("this user has too many connections")

    def close(self, connection: Connection) -> None:
        """Forget a connection. Idempotent; never closes its sink."""
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        for subscription in connection.subscriptions.values():
            self._end(subscription)
        connection.subscriptions.clear()
        self._policy.leave(connection.member)
        if (subject := connection.claims.subject) is not None:
            self._per_user[subject] -= 1
            if not self._per_user[subject]:
                del self._per_user[subject]

    def room(self, connection: Connection) -> None:
        """The connection's sink can take more."""
        for subscription in connection.subscriptions.values():
            if subscription.state is State.BLOCKED:
                self._catch_up.resume(subscription)

    async def reauthenticate(self, connection: Connection, claims: Claims) -> None:
        """Newer claims of the same user; subscriptions stay, and are told to resync if they see otherwise now.

        Raises:
            ForbiddenError: another user, or another role.
        """
        if (claims.user, claims.role) != (connection.claims.user, connection.claims.role):
            raise ForbiddenError("the new token is of another user or role")
        await self._look_at(claims)
        async with self._standing.turn:
            if connection not in self.connections:
                return  # lost meanwhile, and its member left
            member = self._policy.join(claims)  # the one that was waited for, unless it was forgotten meanwhile
            connection.claims, connection.warned = claims, False
            for subscription in connection.subscriptions.values():
                self._change_member(subscription, member)
            connection.member, member = member, connection.member
            self._policy.leave(member)

    def _change_member(self, subscription: Subscription, member: Member) -> None:
        """A subscription is about to be another member's: its reader is owed a resync if that one sees otherwise."""
        before = subscription.connection.member
        if member is before:
            return
        if self._settler.is_settled(member) and all(
            (now := member.sights.get(table)) and (seen := before.sights.get(table)) and now.digest == seen.digest
            for table in subscription.tables
        ):
            self._catch_up.step_back(subscription)
        else:
            self._catch_up.owe(subscription, "visibility_changed")

    async def _wait_for(self, member: Member) -> None:
        """Until a member is settled, or for a while."""
        if not self._settler.is_settled(member):
            await asyncio.wait((self._settler.settle(member),), timeout=_SETTLE_SECONDS)

    # -- subscriptions -------------------------------------------------------------------------------------------------

    def refusal(self, table: str, claims: Claims) -> str | None:
        """Why a table cannot be subscribed to with these claims.

        In one sentence; None if nothing speaks against it.
        """
        return self._policy.refusal(table, claims)

    def check_filter(self, filter_: Filter, table: str, claims: Claims) -> None:
        """Before anything is subscribed to with a filter.

        Raises:
            BadRequestError: it never could hold, or looks at what these claims may not read.
        """
        check_filter(filter_, table, claims, self._policy)

    def subscribe(
        self,
        connection: Connection,
        tables: Collection[str],
        start: Start,
        *,
        id_: str | None = None,
        filter_: Filter | None = None,
        events: frozenset[str] | None = None,
        columns: tuple[str, ...] | None = None,
        by_hand: Callable[[], None] | None = None,
    ) -> Subscription:
        """Begin to read at what `locate` answered.

        Raises:
            BadRequestError: the id is taken.
            TooManyRequestsError: the connection has `MAX_SUBSCRIPTIONS`.
        """
        if id_ in connection.subscriptions:
            raise BadRequestError("id: already subscribed")
        if len(connection.subscriptions) >= MAX_SUBSCRIPTIONS:
            raise TooManyRequestsError(f"at most {MAX_SUBSCRIPTIONS} subscriptions a connection")
        number, owed, _, told, is_fresh = self._valid(start)
        member = connection.member
        subscription = Subscription(
            connection,
            id_,
            frozenset(tables),
            number,
            filter=filter_,
            events=events,
            columns=columns,
            by_hand=by_hand,
            owed=owed,
            came_told=told,
            fresh=(member, member.learned) if is_fresh and not member.pending else None,
        )
        connection.subscriptions[id_] = subscription
        if by_hand is None:
            self._catch_up.resume(subscription)
        return subscription

    async def unsubscribe(self, connection: Connection, id_: str) -> bool:
        """End a subscription made by message; False if there is none of this id. Afterwards nothing is sent for it."""
        async with self._standing.turn:
            subscription = connection.subscriptions.pop(id_, None)
            if subscription is None:
                return False
            self._end(subscription)
            return True

    async def advance(self, subscription: Subscription, *, most: int) -> int:
        """One bounded step of a subscription that is advanced by hand: see `CatchUp.advance`."""
        return await self._catch_up.advance(subscription, most=most)

    def _end(self, subscription: Subscription) -> None:
        if subscription.state is State.AT_END:
            self._standing.depart(subscription, self._standing.number, State.ENDED)
        subscription.state = State.ENDED
