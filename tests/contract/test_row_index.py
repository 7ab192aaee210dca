"""The contract of `broker.base` about the row index, on every broker; and what only Redis can suffer."""

import uuid
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from realtime_bridge.broker.base import FIELD_BYTES, NOTE, Broker, IndexedTable, RowChange
from realtime_bridge.errors import ForkError, LeaseLostError
from tests.contract.brokers import OpenBrokers, change, changes, open_memory, open_redis
from tests.contract.test_broker_forks import relead, store_of

T = "public.posts"
U = "public.comments"


async def test_rows_change_with_the_append_and_every_process_reads_them(brokers: OpenBrokers) -> None:
    async with brokers(2) as [leader, other]:
        token = await leader.acquire_lease(ttl=60)
        await leader.append(token, changes(1), rows=[RowChange(T, "a", b"1"), RowChange(U, "a", b"\x00\xff")])
        assert await other.rows(T, ["a", "b"]) == [b"1", None]
        assert await other.rows(U, ["a"]) == [b"\x00\xff"]
        assert await other.rows(U, []) == []
        await leader.append(token, [], rows=[RowChange(T, "b", b"2"), RowChange(T, "a"), RowChange(T, "b", b"3")])
        assert await other.rows(T, ["b", "a", "b"]) == [b"3", None, b"3"]
        assert (await other.head()).number == 1


async def test_a_tables_fields_are_told_unless_they_are_too_many(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=60)
        names = [NOTE, "a", "ü", "z"]
        await broker.append(token, [], rows=[RowChange(table, name, b"1") for table in (T, U) for name in names])
        await broker.append(token, [], rows=[RowChange(T, "z"), RowChange(U, "b", b"1")])
        assert sorted(await broker.fields(T, most=2) or []) == ["a", "ü"]
        assert await broker.fields(T, most=1) is None
        assert sorted(await broker.fields(U, most=4) or []) == ["a", "b", "z", "ü"]
        assert await broker.fields("public.never", most=0) == []


async def test_a_page_leaves_alone_what_is_there_already(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, [], rows=[RowChange(T, "a", b"live")])
        page = [RowChange(T, field, b"read", only_new=True) for field in ("a", "b")]
        await broker.append(token, [], rows=page)
        assert await broker.rows(T, ["a", "b"]) == [b"live", b"read"]


async def test_a_table_is_forgotten_whole_and_alone(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=60)
        fields = [RowChange(table, field, b"1") for table in (T, U) for field in (NOTE, "a", "b")]
        await broker.append(token, [], rows=fields)
        await broker.append(token, [], rows=[RowChange(T), RowChange(T, "c", b"1"), RowChange("public.never")])
        assert await broker.rows(T, [NOTE, "a", "b", "c"]) == [None, None, None, b"1"]
        assert await broker.rows(U, [NOTE, "a", "b"]) == [b"1"] * 3
        await broker.append(token, [], rows=[RowChange(T)])
        assert set(await broker.indexed()) == {U}


async def test_beyond_its_bound_it_takes_nothing_new_but_keeps_what_it_has_up_to_date(brokers: OpenBrokers) -> None:
    cost = FIELD_BYTES + 1 + 10
    async with brokers(row_index_bytes=3 * cost) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, [], rows=[RowChange(T, "a", b"x" * 10), RowChange(U, "a", b"x" * 10)])
        await broker.append(token, [], rows=[RowChange(T, field, b"x" * 10) for field in ("b", "c", "d")])
        assert await broker.indexed() == {T: IndexedTable(2 * cost, 2), U: IndexedTable(cost, 0)}
        await broker.append(token, [], rows=[RowChange(T, "a", b"y" * 20), RowChange(T, NOTE, b"kept")])
        assert await broker.rows(T, ["a", "b", "c", NOTE]) == [b"y" * 20, b"x" * 10, None, b"kept"]
        room = [RowChange(T, "a"), RowChange(T, NOTE), RowChange(T, "c", b"x" * 10), RowChange(T, "d", b"x" * 10)]
        await broker.append(token, [], rows=room)
        assert await broker.rows(T, ["a", "c", "d"]) == [None, b"x" * 10, None]
        assert await broker.indexed() == {T: IndexedTable(2 * cost, 3), U: IndexedTable(cost, 0)}
        await broker.append(token, [], rows=[RowChange(T)])
        assert await broker.indexed() == {U: IndexedTable(cost, 0)}


async def test_who_does_not_lead_changes_no_row(brokers: OpenBrokers) -> None:
    async with brokers() as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, [], rows=[RowChange(T, "a", b"1")])
        await broker.release_lease(token)
        with pytest.raises(LeaseLostError):
            await broker.append(token, [], rows=[RowChange(T, "a", b"2"), RowChange(U, "a", b"2")])
        assert (await broker.rows(T, ["a"]), await broker.rows(U, ["a"])) == ([b"1"], [None])


FIELDS = [NOTE, "a", "b", "ü", "dd"]
tables = st.sampled_from([T, U])
fields = st.sampled_from(FIELDS)
row_changes = st.one_of(
    st.builds(RowChange, tables, fields, st.binary(min_size=1, max_size=90), st.booleans()),
    st.builds(RowChange, tables, st.one_of(st.none(), fields)),
)


async def shown(broker: Broker, plan: list[list[RowChange]]) -> list[Any]:
    token = await broker.acquire_lease(ttl=60)
    answers: list[Any] = []
    for rows in plan:
        await broker.append(token, [], rows=rows)
        answers.append(await broker.indexed())
        answers += [await broker.rows(table, FIELDS) for table in (T, U)]
    return answers


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(row_changes, max_size=6), max_size=6))
async def test_brokers_agree_on_any_changes(redis_url: str, plan: list[list[RowChange]]) -> None:
    async with (
        open_memory(row_index_bytes=400) as [memory],
        open_redis(redis_url, f"test-{uuid.uuid4().hex}", row_index_bytes=400) as [redis],
    ):
        assert await shown(memory, plan) == await shown(redis, plan)


# -- failovers and losses --------------------------------------------------------------------------------------------


async def test_a_lost_append_takes_its_rows_along(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1), watermark="one", rows=[RowChange(T, "a", b"1")])
        fail_over = await store.replicate()
        await broker.append(token, changes(2), watermark="two", rows=[RowChange(T, "a", b"2"), RowChange(U, "b", b"2")])
        await fail_over()
        with pytest.raises(ForkError):
            await broker.append(token, changes(3), rows=[RowChange(T, "a", b"3")])
        assert await broker.watermark() == "one"
        assert (await broker.rows(T, ["a"]), await broker.rows(U, ["b"])) == ([b"1"], [None])
        assert set(await broker.indexed()) == {T}
        again = [RowChange(T, "a", b"2"), RowChange(U, "b", b"2")]
        await broker.append(token, changes(2), watermark="two", rows=again)
        assert (await broker.rows(T, ["a"]), await broker.rows(U, ["b"])) == ([b"2"], [b"2"])


@pytest.mark.parametrize("lost", [["state"], ["rows"], ["state", "history", "rows"]])
async def test_rows_that_outlive_what_they_belong_to_count_for_nothing(
    lost: list[str], redis_url: str, namespace: str
) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, changes(1), rows=[RowChange(T, "a", b"1"), RowChange(T, "b", b"1")])
        await store.redis.delete(*(store.prefix + name for name in lost))
        assert await broker.rows(T, ["a", "b"]) == [None, None]
        if "state" in lost:
            token = await relead(broker, token)
        await broker.append(token, [change(2)], rows=[RowChange(T, "b", b"2")])
        assert await broker.rows(T, ["a", "b"]) == [None, b"2"]
        assert await broker.indexed() == {T: IndexedTable(FIELD_BYTES + 2, 0)}


async def test_a_table_that_was_evicted_is_forgotten_with_its_note(redis_url: str, namespace: str) -> None:
    async with store_of(redis_url, namespace) as store, open_redis(redis_url, namespace) as [broker]:
        token = await broker.acquire_lease(ttl=60)
        await broker.append(token, [], rows=[RowChange(T, NOTE, b"whole"), RowChange(T, "a", b"1")])
        await store.redis.delete(f"{store.prefix}rows:{T}")
        assert await broker.rows(T, [NOTE, "a"]) == [None, None]
        await broker.append(token, [], rows=[RowChange(T), RowChange(T, "a", b"2")])
        assert await broker.indexed() == {T: IndexedTable(FIELD_BYTES + 2, 0)}
