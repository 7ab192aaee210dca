"""Processes that cannot read policies, or facts of users, for a while: who is served by one or comes from one is told.

Nobody may keep a copy that shows what may not be seen, or lacks what may: each is told at least once.
"""

import asyncio

import pytest

from realtime_bridge.change import Control
from realtime_bridge.hub import hub as hub_module
from tests.hubs import (
    ANN,
    BOB,
    NOTES,
    POSTS,
    claims,
    insert,
    poll,
)
from tests.replicas import (
    ALL,
    ALWAYS,
    ASKED,
    FLAG,
    OWN,
    TEAM,
    THIRD,
    TOLD,
    FactCatalog,
    Poller,
    World,
    leaves,
    moved,
    replicas,
    setting,
    start,
)
from tests.services import eventually


@pytest.fixture(autouse=True)
def _nobody_looks_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WATCH_SECONDS", 3600.0)


@pytest.mark.parametrize("moves", [False, True])
async def test_rights_altered_again_where_they_cannot_be_read_are_told(moves: bool) -> None:
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        blind, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await blind.world.connect(BOB)
        await it.settled()
        it.policies[POSTS] = ALL
        await blind.look()
        await leader.look()
        await it.told(1)
        assert reader.resyncs == TOLD
        blind.catalog.failures = ALWAYS
        it.policies[POSTS] = OWN
        await leader.look()
        await it.told(2)
        told = list(reader.resyncs)
        if moves:
            told += (await moved(connection, blind, leader)).resyncs
        assert len(told) >= 2


async def test_rights_that_go_to_and_fro_where_they_cannot_be_read_are_told() -> None:
    """What it reads in between, since it is told of a change that cannot be decided, shows what it may not see."""
    async with replicas({POSTS: ALL, NOTES: OWN}) as it:
        blind, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        _connection, reader = await blind.world.connect(BOB)
        await it.settled()
        it.policies[POSTS] = OWN
        await blind.look()
        await leader.look()
        await it.told(1)
        assert reader.resyncs == TOLD
        blind.catalog.failures = ALWAYS
        it.policies[POSTS] = ALL
        await leader.look()
        await it.told(2)
        await it.append(1)  # reader is told: it reads with ALL in force
        before = len(reader.resyncs)
        it.policies[POSTS] = OWN
        await leader.look()
        await it.told(3)
        blind.catalog.failures = 0
        await blind.look()
        await it.append(2)
        assert len(reader.resyncs) > before, reader.resyncs


@pytest.mark.parametrize("moves", [False, True])
async def test_a_table_that_is_dropped_where_it_cannot_be_read_is_told(moves: bool) -> None:
    async with replicas({POSTS: ALL, NOTES: OWN}) as it:
        blind, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await blind.world.connect(BOB)
        await it.settled()
        blind.catalog.failures = ALWAYS
        await blind.world.append(Control("catalog", POSTS))
        await it.settled()
        it.policies[POSTS] = None
        blind.catalog.failures = 0
        await blind.look()
        await it.settled()
        await leader.look()
        await it.told(1)
        told = list(reader.resyncs)
        if moves:
            told += (await moved(connection, blind, leader)).resyncs
        assert told


async def test_a_table_that_is_dropped_there_and_back_is_told() -> None:
    async with replicas({POSTS: ALL, NOTES: OWN}) as it:
        only = await it.start()
        await it.lead(only.world.policy)
        _connection, reader = await only.world.connect(BOB)
        await it.settled()
        only.catalog.failures = ALWAYS
        await only.world.append(Control("catalog", POSTS))
        await it.settled()
        it.policies[POSTS] = None
        only.catalog.failures = 0
        await only.look()
        await it.told(1)
        it.policies[POSTS] = ALL
        await only.look()
        await it.told(2)
        assert reader.resyncs


# -- facts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [FLAG, TEAM, ASKED], ids=["flag", "team", "asked"])
@pytest.mark.parametrize("fails", [False, True], ids=["reads", "unlearned"])
async def test_whoever_stays_is_told_of_facts_that_changed(policy: str, fails: bool) -> None:
    """Sanity: who stays is told; while facts cannot be read, once they can and a change came."""
    async with replicas({POSTS: policy, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world)
        _, reader = await one.world.connect(BOB)
        await it.settled()
        await it.append(5)
        assert reader.keys == [5]
        asking.fails = fails
        world.flag, world.teams = False, frozenset()
        await one.world.append(setting("DELETE") if policy == FLAG else leaves())
        await it.settled()
        asking.fails = False
        await it.append(6)
        await it.append(7)
        assert (reader.keys, reader.resyncs[:1]) == ([5], TOLD)
        if not fails:
            assert reader.resyncs == TOLD


@pytest.mark.parametrize("policy", [FLAG, TEAM, ASKED], ids=["flag", "team", "asked"])
@pytest.mark.parametrize("blind", ["facts", "catalog"])
@pytest.mark.parametrize("known", [False, True], ids=["unknown-to-broker", "known"])
async def test_who_begins_where_nothing_is_known_and_stays_is_told(policy: str, blind: str, known: bool) -> None:
    async with replicas({POSTS: policy, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world)
        other, _ = await start(it, world)
        if known:
            await other.world.connect(BOB)
            await it.settled()
        if blind == "facts":
            asking.fails = True
        else:
            one.catalog.failures = ALWAYS
            await one.world.append(Control("catalog", POSTS))
            await it.settled()
        start_ = await one.world.hub.locate(None, claims(BOB))
        connection, reader = one.world.open(BOB)
        one.world.hub.subscribe(connection, (POSTS,), start_)
        await it.settled()
        world.flag, world.teams = False, frozenset()
        await one.world.append(setting("DELETE") if policy == FLAG else leaves())
        await it.settled()
        asking.fails = False
        one.catalog.failures = 0
        await one.look()
        await one.world.append(insert(6, table=NOTES))
        await it.append(6)
        await it.append(7)
        assert reader.resyncs


@pytest.mark.parametrize("policy", [FLAG, TEAM, ASKED], ids=["flag", "team", "asked"])
@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
async def test_an_entry_that_is_passed_without_the_facts_is_told(policy: str, moves: bool) -> None:
    """Whoever is served where facts cannot be read while the membership ends."""
    async with replicas({POSTS: policy, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world)
        other, _ = await start(it, world)
        await other.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        await it.append(5)
        assert reader.keys == [5]
        asking.fails = True
        world.flag, world.teams = False, frozenset()
        await one.world.append(setting("DELETE") if policy == FLAG else leaves())
        await it.settled()
        told = list(reader.resyncs)
        if moves:
            told += (await moved(connection, one, other)).resyncs
        else:
            asking.fails = False
            await it.append(6)
            await it.append(7)
            told = list(reader.resyncs)
        assert told


@pytest.mark.parametrize("policy", [FLAG, TEAM, ASKED], ids=["flag", "team", "asked"])
@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
async def test_an_entry_that_is_passed_without_the_policies_is_told(policy: str, moves: bool) -> None:
    """Whoever is served where policies cannot be read while the membership ends."""
    async with replicas({POSTS: policy, NOTES: OWN}) as it:
        world = World()
        one, _asking = await start(it, world)
        other, _ = await start(it, world)
        await other.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        await it.append(5)
        assert reader.keys == [5]
        one.catalog.failures = ALWAYS
        await one.world.append(Control("catalog", POSTS))
        await it.settled()
        world.flag, world.teams = False, frozenset()
        await one.world.append(setting("DELETE") if policy == FLAG else leaves())
        await it.settled()
        told = list(reader.resyncs)
        if moves:
            told += (await moved(connection, one, other)).resyncs
        else:
            one.catalog.failures = 0
            await one.look()
            await it.append(6)
            await it.append(7)
            told = list(reader.resyncs)
        assert told


@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
async def test_rights_that_are_found_while_facts_cannot_be_read_are_told(moves: bool) -> None:
    async with replicas({POSTS: FLAG, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world)
        leader, _ = await start(it, world)
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        asking.fails = True
        it.policies[POSTS] = TEAM
        world.teams = frozenset()
        await one.look()
        await leader.look()
        await it.told(1)
        told = list(reader.resyncs)
        if moves:
            told += (await moved(connection, one, leader)).resyncs
        assert told


async def test_who_comes_from_a_slow_process_to_a_blind_one_is_told() -> None:
    """From where the former rights are in use still, to where nothing is known, which finds the new ones then."""
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        quick, slow, leader = [await it.start() for _ in range(3)]
        await it.lead(leader.world.policy)
        connection, reader = await slow.world.connect(BOB)
        await quick.world.connect(BOB)
        await it.settled()
        leader.catalog.failures = ALWAYS
        async with slow.world.held():  # it comes to this later
            await leader.world.append(Control("catalog", POSTS))
            await eventually(lambda: leader.world.policy._tables[POSTS].doubtful)
        await it.settled()
        it.policies[POSTS] = OWN
        await quick.look()
        await it.settled()
        await it.append(1)  # shown to Bob by the slow one still
        assert reader.keys == [1]
        position = slow.world.hub.position_of(connection)
        slow.world.hub.close(connection)
        _, back = await leader.world.connect(BOB, position)
        await it.settled()
        leader.catalog.failures = 0
        await leader.look()
        await it.told(1)
        await slow.look()
        await it.append(2)
        assert back.resyncs


async def test_rights_that_go_to_and_fro_where_a_process_lags_are_told() -> None:
    """A process meets an entry when what it tells of is over again; its reader may have read in between."""
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        slow, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        _connection, reader = await slow.world.connect(BOB)
        await it.settled()
        it.policies[POSTS] = OWN
        await slow.look()
        await leader.look()
        await it.told(1)
        assert reader.resyncs == TOLD  # and reads a little later: by ALL
        async with slow.world.held():
            it.policies[POSTS] = ALL
            await leader.look()
            await eventually(lambda: it.rights.told == 2)
            it.policies[POSTS] = OWN
        await it.settled()
        await leader.look()
        await it.told(3)
        await it.append(1)
        assert reader.keys == []
        assert len(reader.resyncs) > 1


@pytest.mark.parametrize("moves", [False, True])
async def test_rights_that_were_half_read_are_told(moves: bool) -> None:
    """Postgres goes away in the middle: the table that was read first is in doubt all the same."""
    async with replicas({POSTS: FLAG, NOTES: TEAM}) as it:
        world = World()
        one, asking = await start(it, world)
        leader, _ = await start(it, world)
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        asking.types_fail = {"ARRAY(SELECT m.team FROM public.members m WHERE m.user_id = auth.uid())"}
        it.policies[POSTS] = OWN
        await leader.look()
        await it.told(1)
        told = list(reader.resyncs)
        if moves:
            told += (await moved(connection, one, leader)).resyncs
        assert told


async def test_one_entry_that_tells_of_two_alterations_is_told() -> None:
    """It finds the second rights, not the third, of which the only entry tells."""
    async with replicas({POSTS: ALL, NOTES: OWN}) as it:
        one, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        it.policies[POSTS] = THIRD
        await one.look()
        await it.settled()
        assert reader.resyncs == TOLD
        one.catalog.failures = ALWAYS
        it.policies[POSTS] = OWN
        await leader.look()
        await it.told(1)
        told = reader.resyncs + (await moved(connection, one, leader)).resyncs
        assert len(told) >= 2


async def test_what_no_entry_tells_is_told_after_a_long_time_without_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no entry tells has changed while a poll is served where it cannot be asked."""
    monkeypatch.setattr(FactCatalog, "published", lambda *_: asyncio.sleep(0, set()))
    async with replicas({POSTS: FLAG, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world, 0.01)
        other, _ = await start(it, world, 0.01)
        poller = Poller()
        assert await poller.poll(one) == []
        await one.world.append(insert(1, table=NOTES, owner=ANN))
        await it.settled()
        assert await poller.poll(one) == []
        asking.fails = True
        world.flag = False
        await asyncio.sleep(0.05)
        later = 0.0
        import time as time_module

        it.broker._clock = lambda: time_module.time() + later
        got = []
        for _ in range(10):
            later += 45
            connection, _r = await other.world.connect(BOB)
            await it.settled()
            other.world.hub.close(connection)
            await one.world.append(insert(1, table=NOTES, owner=ANN))
            await it.settled()
            got += await poller.poll(one)
        got += await poller.poll(other)
        assert got


@pytest.mark.parametrize("policy", [TEAM, ASKED], ids=["team", "asked"])
async def test_an_entry_of_a_table_that_policies_have_begun_to_read_elsewhere_is_told(policy: str) -> None:
    """The rights that it cannot read refer to memberships of which it has never heard."""
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        world = World()
        one, _asking = await start(it, world)
        leader, _ = await start(it, world)
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        one.catalog.failures = ALWAYS
        it.policies[POSTS] = policy
        await leader.look()
        await it.told(1)
        assert reader.resyncs == TOLD  # and reads, as a member
        world.teams = frozenset()
        await one.world.append(leaves())
        await it.settled()
        told = reader.resyncs + (await moved(connection, one, leader)).resyncs
        assert len(told) >= 2


@pytest.mark.parametrize("blind", ["facts", "catalog"])
async def test_who_read_while_nothing_was_known_is_told_once_it_is(blind: str) -> None:
    """It is told of a change that cannot be decided, and reads what it may see no more once that is over."""
    async with replicas({POSTS: FLAG, NOTES: OWN}) as it:
        world = World(flag=False)
        one, asking = await start(it, world)
        _, reader = await one.world.connect(BOB)
        await it.settled()
        if blind == "catalog":
            one.catalog.failures = ALWAYS
            await one.world.append(Control("catalog", POSTS))
            await it.settled()
            it.policies[POSTS] = ALL
        else:
            asking.fails = True
            world.flag = True
            await one.world.append(setting())
            await it.settled()
        before = len(reader.resyncs)
        await it.append(1)
        assert len(reader.resyncs) == before + 1  # and reads everything
        before = len(reader.resyncs)
        if blind == "catalog":
            it.policies[POSTS] = FLAG
            one.catalog.failures = 0
            await one.look()
        else:
            world.flag = False
            await one.world.append(setting("DELETE"))
            await it.settled()
            asking.fails = False
        await it.append(2)
        await it.append(3)
        assert reader.keys == []
        assert len(reader.resyncs) > before


async def test_facts_that_could_not_be_read_once_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FactCatalog, "published", lambda *_: asyncio.sleep(0, set()))
    async with replicas({POSTS: FLAG, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world, 0.01)
        poller = Poller()
        await it.append(1)
        assert await poller.poll(one) == []
        await asyncio.sleep(0.03)
        asking.fails = True
        assert await poller.poll(one) == []
        asking.fails = False
        world.flag = False
        got = []
        for _ in range(5):
            await asyncio.sleep(0.03)
            got += await poller.poll(one)
        assert got


async def test_who_polled_while_nothing_was_known_is_told_once_it_is() -> None:
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        one = await it.start()
        poller = Poller()
        assert await poller.poll(one) == []
        await one.world.append(insert(1, table=NOTES))
        await it.settled()
        assert await poller.poll(one) == []
        one.catalog.failures = ALWAYS
        await one.world.append(Control("catalog", POSTS))
        await it.settled()
        it.policies[POSTS] = ALL
        await it.append(1)
        assert await poller.poll(one) == TOLD  # and reads everything
        it.policies[POSTS] = OWN
        one.catalog.failures = 0
        await one.look()
        await it.append(2)
        assert (await poller.poll(one))[:1] == TOLD
        assert await poller.poll(one) == []


@pytest.mark.parametrize("closed", [None, "false"], ids=["dropped", "for nobody"])
@pytest.mark.parametrize("moves", [False, True], ids=["stays", "moves"])
async def test_what_is_opened_while_policies_cannot_be_read_is_told(closed: str | None, moves: bool) -> None:
    """What it was closed to last is as unknown as what it was open to."""
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        one, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        await leader.world.connect(BOB)
        connection, reader = await one.world.connect(BOB)
        await it.settled()
        it.policies[POSTS] = closed
        await leader.look()
        await it.told(1)
        assert reader.resyncs == TOLD
        one.catalog.failures = ALWAYS
        it.policies[POSTS] = THIRD
        await leader.look()
        await it.told(2)
        assert reader.resyncs == TOLD * 2
        await it.append(1)
        if moves:
            back = await moved(connection, one, leader)
            assert (reader.keys + back.keys == [1]) or len(reader.resyncs + back.resyncs) > 2
        else:
            assert len(reader.resyncs) > 2


@pytest.mark.parametrize("way", ["ad", "ac"])
async def test_facts_that_go_to_and_fro_while_they_cannot_be_read_are_told(way: str) -> None:
    """What was confirmed before it could not be read, and is so again, was something else in between."""
    async with replicas({POSTS: FLAG, NOTES: OWN}) as it:
        world = World(flag=False)
        one, asking = await start(it, world)
        _, reader = await one.world.connect(BOB)
        await it.settled()
        if way == "ad":
            await one.world.append(setting())  # changes nothing
            await one.world.append(setting())
            await it.settled()
        before = len(reader.resyncs)
        asking.fails = True
        world.flag = True
        await one.world.append(setting())
        await it.settled()
        await it.append(1)
        assert len(reader.resyncs) > before  # and reads everything
        before = len(reader.resyncs)
        world.flag = False
        asking.fails = False
        if way == "ac":
            it.policies[NOTES] = ALL
            asking.gate = asyncio.Event()
            await one.world.append(setting("DELETE"), Control("catalog", NOTES, commit_time=7))
            await eventually(lambda: one.world.hub.position.endswith(f"-{it.broker._number}"))
            asking.gate.set()
        else:
            await one.world.append(setting("DELETE"))
        await it.settled()
        await it.append(2)
        await it.append(3)
        assert reader.keys == []
        assert len(reader.resyncs) > before


async def test_facts_that_go_to_and_fro_are_told_to_polls() -> None:
    async with replicas({POSTS: FLAG, NOTES: OWN}) as it:
        world = World(flag=False)
        one, asking = await start(it, world)
        poller = Poller()
        assert await poller.poll(one) == []
        await one.world.append(insert(1, table=NOTES))
        await it.settled()
        assert await poller.poll(one) == []
        asking.fails = True
        world.flag = True
        await one.world.append(setting())
        await it.append(1)
        assert set(await poller.poll(one)) == set(TOLD)  # and reads everything
        world.flag = False
        await one.world.append(setting("DELETE"))
        await it.settled()
        asking.fails = False
        it.policies[NOTES] = ALL
        await one.look()
        await it.append(2)
        got = (await poll(one.world, BOB, poller.position))["messages"]
        assert {message["table"] for message in got} == {POSTS, NOTES}


async def test_who_polls_while_something_is_not_known_is_told_of_nothing_before_everything_is() -> None:
    async with replicas({POSTS: TEAM, NOTES: OWN}) as it:
        world = World()
        one, asking = await start(it, world)
        other, _ = await start(it, world)
        reader = Poller()
        await it.append(5)
        assert await reader.poll(one) == []
        asking.fails = True
        await one.world.append(leaves())
        await it.settled()
        told = [reason for _ in range(4) for reason in await reader.poll(one)]
        assert told == TOLD  # of what the entry has put in doubt
        assert sorted(await reader.poll(other)) == 2 * TOLD
        assert [await reader.poll(other) for _ in range(2)] == [[], []]
