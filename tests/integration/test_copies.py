"""After random transactions every client's copy equals what `SELECT` shows that user, whatever the source brings.

Two replicas share a Valkey, or one has the history in memory; clients use WebSockets and long polls, go away, come back
to the other replica and resume by position. Each image that is delivered must satisfy the policy by itself, and `left`
brings the key alone.

Where Postgres is read and Valkey is shared, `tests/oracle` asks for more: several tables, memberships and policies that
change, faults. Here no resync is allowed but where it is said.
"""

import asyncio
import json
import random
import uuid
from typing import Any

import asyncpg
import pytest

from tests.clients import Copy, Message, http
from tests.services import eventually, token
from tests.ways import SHARED_WAYS, WAYS, Way

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(120)]

SECONDS = 8.0
FEWEST_TRANSACTIONS = 50
USERS = [str(uuid.UUID(int=i + 1)) for i in range(4)]


class Writer:
    """Random transactions on `posts`, as the owner of the table."""

    def __init__(self, connection: asyncpg.Connection, seed: int) -> None:
        self._connection = connection
        self._random = random.Random(seed)
        self.transactions = 0

    async def write(self) -> None:
        """One transaction; one in eight is rolled back."""
        transaction = self._connection.transaction()
        await transaction.start()
        for _ in range(self._random.choice([1, 1, 1, 2, 5])):
            await self._statement()
        if self._random.random() < 1 / 8:
            await transaction.rollback()
        else:
            await transaction.commit()
        self.transactions += 1

    async def _statement(self) -> None:
        some = "(select id from posts order by random() limit 1)"
        text = "".join(self._random.choices("abc äöü \"\\'{}\n\t€😀", k=self._random.randint(0, 40)))
        kind = self._random.choices(
            ["insert", "edit", "toggle", "move", "delete", "many", "large"], [6, 4, 3, 2, 3, 1, 1]
        )[0]
        owner, public = self._random.choice(USERS), self._random.random() < 0.3
        sql: str
        arguments: tuple[Any, ...]
        match kind:
            case "insert":
                sql, arguments = (
                    "insert into posts (user_id, title, is_public) values ($1, $2, $3)",
                    (owner, text, public),
                )
            case "edit":
                sql, arguments = f"update posts set title = $1 where id = {some}", (text,)
            case "toggle":
                sql, arguments = f"update posts set is_public = not is_public where id = {some}", ()
            case "move":
                sql, arguments = f"update posts set user_id = $1 where id = {some}", (owner,)
            case "delete":
                sql, arguments = f"delete from posts where id = {some}", ()
            case "many":
                sql, arguments = (
                    "update posts set is_public = not is_public where id % 3 = $1",
                    (self._random.randrange(3),),
                )
            case _:  # a value that Postgres stores out of line, and an update that leaves it unchanged
                body = "".join(self._random.choices("0123456789abcdef", k=9000))
                sql, arguments = f"update posts set body = $1 where id = {some}", (body,)
        await self._connection.execute(sql, *arguments)


class CheckedCopy(Copy):
    """A copy that looks at every message with the user's eyes."""

    def __init__(self, url: str, user: str) -> None:
        super().__init__(url, token(user))
        self.user = user

    def may_see(self, image: Message) -> bool:
        return image["user_id"] == self.user or bool(image["is_public"])

    async def take(self, message: Message) -> None:
        for image in (message.get("record"), message.get("old_record")):
            if image is not None and len(image) > 1:
                assert self.may_see(image), f"leaked to {self.user}: {message}"
        if message.get("left"):
            assert list(message["old_record"]) == ["id"]
        await super().take(message)


async def truth(database: str, user: str) -> dict[int, Any]:
    """What `SELECT` shows a user."""
    connection = await asyncpg.connect(database, server_settings={"timezone": "UTC"})
    try:
        async with connection.transaction():
            claims = json.dumps({"sub": user, "role": "authenticated"})
            await connection.execute("select set_config('role', 'authenticated', true)")
            await connection.execute("select set_config('request.jwt.claims', $1, true)", claims)
            rows = await connection.fetch("select id, to_jsonb(p)::text as row from posts p")
            return {row["id"]: json.loads(row["row"]) for row in rows}
    finally:
        await connection.close()


async def socket_client(copy: Copy, urls: list[str], chance: random.Random) -> None:
    """Follow a WebSocket, leaving after a while for another replica, for ever."""
    while True:
        copy.url = chance.choice(urls)
        try:
            async with asyncio.timeout(chance.uniform(0.5, 3)):
                await copy.follow()
        except TimeoutError:
            continue


async def poll_client(copy: Copy, urls: list[str], chance: random.Random) -> None:
    """Poll any replica, with limits that cut answers, for ever."""
    async with http("", copy.token) as client:
        while True:
            copy.url = chance.choice(urls)
            await copy.poll(client, wait=chance.choice([0, 0.2, 1]), limit=chance.choice([1, 7, 500]))


async def followed(way: Way) -> list[CheckedCopy]:
    """Copies, three of each user's, once they have come to equal what `SELECT` shows after random transactions."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    settings = {"BRIDGE_MAX_CONNECTIONS_PER_USER": "100", "BRIDGE_RESYNC_SECONDS": "1"}
    async with way.replicas(2 if way.is_shared else 1, **settings) as bridges:
        urls = [bridge.url for bridge in bridges]
        copies = [CheckedCopy(urls[0], user) for user in USERS for _ in range(3)]
        for copy in copies:
            await copy.load()
        connection = await asyncpg.connect(way.database)
        writer = Writer(connection, seed)
        async with asyncio.TaskGroup() as tasks:
            clients = [
                tasks.create_task((poll_client if i % 3 == 2 else socket_client)(copy, urls, random.Random(seed + i)))
                for i, copy in enumerate(copies)
            ]
            until = asyncio.get_running_loop().time() + SECONDS
            while asyncio.get_running_loop().time() < until or writer.transactions < FEWEST_TRANSACTIONS:
                await writer.write()
                await asyncio.sleep(chance.choice([0, 0, 0.01, 0.05]))
            await connection.close()
            expected = {user: await truth(way.database, user) for user in USERS}

            def differing() -> list[str]:
                return [
                    f"{copy.user}: missing {set(rows) - set(copy.rows)}, too many {set(copy.rows) - set(rows)}, "
                    f"other {[i for i in set(rows) & set(copy.rows) if rows[i] != copy.rows[i]]}"
                    for copy in copies
                    if copy.rows != (rows := expected[copy.user])
                ]

            try:
                await eventually(lambda: not differing(), 30)
            except AssertionError:
                pytest.fail(f"seed {seed}, {writer.transactions} transactions: {differing()}")
            finally:
                for client in clients:
                    client.cancel()
    assert all(copy.history for copy in copies)
    return copies


@pytest.mark.parametrize("way", [name for name in WAYS if name != "postgres-valkey"], indirect=True)
async def test_every_copy_equals_the_select_of_its_user(way: Way) -> None:
    copies = await followed(way)
    assert not any(copy.resyncs for copy in copies)


@pytest.mark.parametrize("way", SHARED_WAYS, indirect=True)
async def test_every_copy_is_as_right_where_no_change_brings_what_was_before(way: Way) -> None:
    connection = await asyncpg.connect(way.database)
    await connection.execute("alter table posts replica identity default")
    await connection.close()
    copies = await followed(way)
    assert any(message.get("left") for copy in copies for message in copy.history)
    # A row that enters with a large value that has not changed cannot be told whole.
    assert {reason for copy in copies for reason in copy.resyncs} <= {"visibility_changed"}
