"""Several hubs on one broker find altered rights one after the other, and a reader goes to and fro between them.

The catalog is one that a test sets by hand: each process looks at it when the test says so. All else is as it is.
"""

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from realtime_bridge.change import Change, Control
from realtime_bridge.filters import parse_filter
from realtime_bridge.hub import hub as hub_module
from realtime_bridge.policy.catalog import Catalog
from realtime_bridge.policy.engine import PolicyEngine
from tests.hubs import (
    ANN,
    BOB,
    NOTES,
    POSTS,
    RELATIONS,
    RULE,
    claims,
    insert,
    poll,
    row,
)
from tests.replicas import ALL, ALWAYS, OWN, ROLE, TOLD, Poller, SetCatalog, replicas
from tests.services import eventually


@pytest.fixture(autouse=True)
def _nobody_looks_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "WATCH_SECONDS", 3600.0)


@pytest.mark.parametrize("waits", [False, True], ids=["comes", "waits"])
async def test_who_was_served_by_former_rights_after_others_were_found_is_told(waits: bool) -> None:
    """It goes to where they were found, to where they were not, and back; there it passes their entry."""
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        quick, slow, leader = [await it.start() for _ in range(3)]
        await it.lead(leader.world.policy)
        reader = Poller()
        await it.append(1, owner=BOB)
        assert await reader.poll(quick) == []
        it.policies[POSTS] = ALL
        await quick.look()
        assert await reader.poll(quick) == TOLD
        await it.append(2)  # which Bob sees by the new policy alone
        assert await reader.poll(slow) == TOLD
        if waits:
            assert await reader.poll(quick) == TOLD
        waiting = asyncio.create_task(reader.poll(quick, wait=60)) if waits else None
        await eventually(lambda: quick.world.hub._standing.directory.count == waits)
        await leader.look()
        await it.told(1)
        assert await (waiting or reader.poll(quick)) == TOLD
        await slow.look()
        for replica in (quick, slow, leader, slow):
            assert await reader.poll(replica) == []


async def test_who_waits_where_rights_are_found_is_told_once_and_passes_their_entry_in_silence() -> None:
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        leader = await it.start()
        _, reader = await leader.world.connect(BOB)
        await it.lead(leader.world.policy)
        await it.settled()
        it.policies[POSTS] = ALL
        await leader.look()
        await it.told(1)
        await it.append(2)
        assert (reader.resyncs, reader.keys) == (TOLD, [2])


@pytest.mark.parametrize("comes_late", [False, True], ids=["before", "meanwhile"])
async def test_who_reads_where_policies_cannot_be_read_is_told_when_others_have_found_other_ones(
    comes_late: bool,
) -> None:
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        blind, leader = await it.start(), await it.start()
        await it.lead(leader.world.policy)
        readers = [] if comes_late else [await blind.world.connect(BOB)]
        await it.settled()
        blind.catalog.failures = ALWAYS
        await blind.world.append(Control("catalog", POSTS))
        await it.settled()
        _, reader = (readers or [await blind.world.connect(BOB)])[0]
        await it.settled()
        it.policies[POSTS] = ALL
        await leader.look()
        await it.told(1)
        assert reader.resyncs == TOLD


@pytest.mark.parametrize("failures", [1, ALWAYS], ids=["once", "for long"])
async def test_policies_that_could_not_be_read_and_are_the_same_are_told_to_nobody(failures: int) -> None:
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        replica = await it.start()
        _, reader = await replica.world.connect(BOB)
        poller = Poller()
        await it.append(1)
        assert await poller.poll(replica) == []
        replica.catalog.failures = failures
        await replica.world.append(Control("catalog", POSTS))
        await it.settled()
        replica.catalog.failures = 0
        await replica.look()
        await it.append(2)
        assert (reader.resyncs, reader.keys) == ([], [1, 2])
        assert await poller.poll(replica) == [2]


@pytest.mark.parametrize("replica_count", [1, 2])
async def test_rights_that_come_back_before_anything_told_of_them_are_news_twice(replica_count: int) -> None:
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        quick, *_ = [await it.start() for _ in range(replica_count)]
        reader = Poller()
        await it.append(1)
        assert await reader.poll(quick) == []
        it.policies[POSTS] = OWN
        await quick.look()
        assert await reader.poll(quick) == TOLD
        await it.append(2)  # which Bob must not see in between
        assert await reader.poll(quick) == []
        it.policies[POSTS] = ALL
        await quick.look()
        await it.lead(it.all[-1].world.policy)
        assert await reader.poll(quick) == TOLD
        for replica in it.all * 2:
            assert await reader.poll(replica) == []
        assert it.rights.told == 0


async def test_a_table_that_was_away_for_a_time_is_told_of_twice() -> None:
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        leader = await it.start()
        await it.lead(leader.world.policy)
        reader = Poller()
        await it.append(1)
        assert await reader.poll(leader) == []
        for policy, entries in ((None, 1), (ALL, 2)):
            it.policies[POSTS] = policy
            await leader.look()
            await it.told(entries)
            assert await reader.poll(leader) == TOLD
            assert await reader.poll(leader) == []


@pytest.mark.parametrize("has_catalog", [True, False])
async def test_a_rule_of_one_process_alone_is_told_of_to_whoever_comes_from_another(has_catalog: bool) -> None:
    """As in a rolling deployment with other BRIDGE_POLICIES."""
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        old = await it.start({POSTS: ALL, NOTES: ALL}, has_catalog=has_catalog)
        new = await it.start({POSTS: OWN, NOTES: OWN}, has_catalog=has_catalog)
        await it.append(1)
        connection, stays = await old.world.connect(BOB, old.world.hub.position)
        await it.settled()
        early = Poller(old.world.hub.position)
        assert set(await early.poll(new)) == set(TOLD)
        await it.append(2, 3)
        assert (stays.keys, stays.resyncs) == ([2, 3], [])
        position = old.world.hub.position_of(connection)
        old.world.hub.close(connection)
        _, back = await new.world.connect(BOB, position)
        await it.settled()
        assert (back.keys, back.resyncs) == ([], TOLD)


async def test_a_successor_that_cannot_read_the_catalog_tells_nothing_of_rights() -> None:
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        first = await it.start()
        leading = await it.lead(first.world.policy)
        catalog = SetCatalog({POSTS: OWN, NOTES: OWN})
        late = PolicyEngine([POSTS, NOTES], [ROLE], {}, cast(Catalog, catalog))
        await late.prepare()
        catalog.failures = ALWAYS
        it.policies[POSTS] = ALL
        await first.look()
        await it.told(1)
        leading.cancel()
        assert late.rights
        await it.lead(late)
        await eventually(lambda: not late.rights)
        assert it.rights.told == 1


async def test_whoever_is_told_of_altered_columns_by_the_history_is_told_of_nothing_else() -> None:
    async with replicas({POSTS: OWN, NOTES: OWN}) as it:
        only = await it.start()
        _, present = await only.world.connect(BOB, tables=(POSTS, NOTES))
        position = only.world.hub.position
        await it.settled()
        it.policies[POSTS] = it.policies[NOTES] = ALL  # by the same transaction
        controls = Control("catalog", "*"), Control("catalog", POSTS), Control("resync", POSTS, "schema_changed")
        change = replace(insert(1), commit_time=5)
        await only.world.append(*(replace(control, commit_time=5) for control in controls), change)
        _, back = await only.world.connect(BOB, position, tables=(POSTS, NOTES))
        await it.settled()
        for reader in (present, back):
            told = [(message["table"], message["reason"]) for message in reader.messages]
            assert told == [(NOTES, "visibility_changed"), (POSTS, "schema_changed")]
        _, again = await only.world.connect(BOB, present.messages[-1]["position"], tables=(POSTS, NOTES))
        await it.settled()
        assert (again.resyncs, again.keys) == ([], [1])
        for before in (present.messages[0]["position"], position):  # from before, all the same
            _, again = await only.world.connect(BOB, before, tables=(POSTS, NOTES))
            await it.settled()
            assert again.resyncs[-1] == "schema_changed"


async def test_a_change_from_before_a_column_came_is_a_resync_to_a_filter_on_it() -> None:
    async with replicas({POSTS: ALL, NOTES: ALL}) as it:
        only = await it.start()
        position = await only.world.hub.position_for(claims(ANN))
        before = replace(RELATIONS[POSTS], columns=RELATIONS[POSTS].columns[:3])
        await only.world.append(Change("INSERT", before, None, row(1)[:3], 0))
        await only.world.append(insert(2, mood="happy"))
        await only.world.settled()
        answer = await poll(only.world, ANN, position, filter_=parse_filter("mood=eq.happy"))
        assert [message["type"] for message in answer["messages"]] == ["resync"]
        await only.world.append(insert(3, mood="happy"))
        await only.world.settled()
        answer = await poll(only.world, ANN, answer["position"], filter_=parse_filter("mood=eq.happy"))
        assert [message["record"]["id"] for message in answer["messages"]] == [3]


async def test_a_poll_is_told_once_of_another_token_that_stays_in_use() -> None:
    async with replicas({}) as it:
        only = await it.start({POSTS: RULE, NOTES: RULE}, has_catalog=False)
        await it.append(1)
        await only.world.connect(BOB, team="blue")
        await it.settled()
        reader = Poller(only.world.hub.position)
        assert set(await reader.poll(only)) == set(TOLD)
        for key in range(2, 6):
            waiting = asyncio.create_task(reader.poll(only, wait=60))
            await eventually(lambda: only.world.hub._standing.directory.count == 2)
            await it.append(key, owner=BOB)
            assert await waiting == [key]
