"""A slot is lost, and with it changes of rows and memberships: all are told, and nothing is decided on what was."""

import uuid
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection

from realtime_bridge.dev.engines import EmbeddedValkey
from tests.clients import Message, http, receive_data
from tests.services import eventually, running, token
from tests.worlds import World, world

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.timeout(120)]

ADA, BOB, CAROL = (str(uuid.UUID(int=n)) for n in (1, 2, 3))
USERS = (ADA, BOB, CAROL)
SCHEMA = f"""
    create table members (person uuid, team int, primary key (person, team));
    create table notes (id int primary key, team int not null);
    alter table notes enable row level security;
    create policy team on notes using (
        exists (select from members m where m.person = auth.uid() and m.team = notes.team));
    grant select on members, notes to authenticated;
    insert into members values ('{ADA}', 1), ('{BOB}', 1), ('{CAROL}', 2);
    insert into notes values (1, 1), (2, 1)
"""
"""Without the old rows in what Postgres sends: the row index has to know them."""
MEANWHILE = f"""
    delete from members where person = '{BOB}';
    insert into members values ('{CAROL}', 1);
    update notes set team = 2 where id = 1;
    insert into notes values (3, 1)
"""


async def test_all_that_was_lost_with_the_slot_is_told_once_and_read_anew(database: str, namespace: str) -> None:
    with running(EmbeddedValkey(durable=True)) as valkey:
        async with world(
            database, namespace, SCHEMA, ["public.notes"], followed=["public.members"], redis_url=valkey.url
        ) as it:
            live = [await it.connect(token(user), bridge) for bridge in it.bridges for user in USERS]
            away = [await position(it, user) for user in USERS]
            await it.admin.execute("insert into notes values (4, 1)")
            assert [events(told) for told in await it.told(*live)] == [["INSERT 4"], ["INSERT 4"], []] * 2
            await lose_the_slot(it, valkey, namespace.replace("-", "_"), MEANWHILE)

            back = [await it.connect(token(user), position=start) for user, start in zip(USERS, away, strict=True)]
            until_then = [await up_to_the_gap(socket) for socket in back]  # which stands for all that was there by then
            await it.admin.execute(
                "insert into notes values (5, 1); delete from notes where id = 1; delete from notes where id = 3"
            )
            told = await it.told(*live, *back)
            told = [*told[:6], *([*first, *then] for first, then in zip(until_then, told[6:], strict=True))]
            assert [resyncs(messages).count("upstream_gap") for messages in told] == [1] * 9
            assert {reason for messages in told for reason in resyncs(messages)} <= {
                "upstream_gap",
                "visibility_changed",
            }
            bob: list[str] = []
            ada, carol = ["INSERT 5", "DELETE 3"], ["INSERT 5", "DELETE 1", "DELETE 3"]
            assert [events(messages) for messages in told[:6]] == [ada, bob, carol] * 2
            assert [events(messages) for messages in told[6:]] == [ada, bob, carol]  # and not the note before the gap
            for user, start in zip(USERS, away, strict=True):
                assert resyncs(await polled(it, user, start)).count("upstream_gap") == 1


async def up_to_the_gap(socket: ClientConnection) -> list[Message]:
    found = [await receive_data(socket)]
    while found[-1].get("reason") != "upstream_gap":
        found.append(await receive_data(socket))
    return [message for message in found if message.get("table") != "fence"]


async def lose_the_slot(it: World, valkey: EmbeddedValkey, slot: str, meanwhile: str) -> None:
    """Nobody can read while it is written, and when they can, the slot is gone."""
    await seeded(it, 1)
    valkey.freeze()
    idle = "select count(*) from pg_replication_slots where slot_name = $1 and not active"
    await eventually(lambda: it.admin.fetchval(idle, slot), 30)
    await it.admin.execute(meanwhile)
    await it.admin.execute("select pg_drop_replication_slot($1)", slot)
    valkey.thaw()
    for bridge in it.bridges:
        await bridge.ready()
    await seeded(it, 2)


async def seeded(it: World, times: int) -> None:
    """The rows were read so many times, whoever did, and what is committed from now on is later than that."""
    await eventually(lambda: sum(bridge.log.count("row index seeded") for bridge in it.bridges) >= times, 30)
    now = await it.admin.fetchval("select clock_timestamp()")
    later = "select clock_timestamp() > $1::timestamptz + interval '1.1 s'"
    await eventually(lambda: it.admin.fetchval(later, now))


async def position(it: World, user: str) -> str:
    """That of the present, of which a long poll begins."""
    async with http(it.bridge.url, token(user)) as client:
        return str((await client.get("/events?wait=0")).json()["position"])


async def polled(it: World, user: str, start: str) -> list[Message]:
    """All that long polls bring from a position to the present."""
    found: list[Message] = []
    async with http(it.bridge.url, token(user)) as client:
        answer: dict[str, Any] = {"more": True, "position": start}
        while answer["more"]:
            answer = (await client.get("/events", params={"wait": 0, "position": answer["position"]})).json()
            found += answer["messages"]
    return found


def events(messages: list[Message]) -> list[str]:
    """Changes in short: `INSERT 4`."""
    return [f"{m['type']} {(m.get('record') or m['old_record'])['id']}" for m in messages if m["type"] != "resync"]


def resyncs(messages: list[Message]) -> list[str]:
    return [message["reason"] for message in messages if message["type"] == "resync"]
