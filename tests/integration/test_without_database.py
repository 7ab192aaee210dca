"""A bridge that has no database of its own: a project's address and key, and rules in place of its policies."""

import uuid

import asyncpg
import orjson
import pytest
from websockets.exceptions import ConnectionClosed

from tests.bridges import BridgeProcess
from tests.clients import open_socket, receive, receive_data
from tests.services import token
from tests.ways import SUPABASE_WAYS, Way

pytestmark = pytest.mark.integration

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
RULES = orjson.dumps({"public.posts": "user_id = auth.uid() or is_public"}).decode()


@pytest.mark.parametrize("way", SUPABASE_WAYS, indirect=True)
async def test_rules_alone_decide_who_sees_a_row(way: Way) -> None:
    no_database = ""
    async with way.upstream("public.posts") as settings:
        async with (
            BridgeProcess(no_database, BRIDGE_POLICIES=RULES, **settings) as bridge,
            open_socket(bridge.url, token(ADA)) as ada,
            open_socket(bridge.url, token(BOB)) as bob,
        ):
            for socket in (ada, bob):
                assert (await receive(socket))["type"] == "ready"
            connection = await asyncpg.connect(way.database)
            insert = "insert into posts (user_id, title, is_public) values ($1, $2, $3) returning id"
            private = await connection.fetchval(insert, ADA, "private", False)
            public = await connection.fetchval(insert, ADA, "public", True)
            await connection.execute("update posts set is_public = false where id = $1", public)
            await connection.execute("update posts set is_public = true where id = $1", private)
            await connection.close()

            seen_by_ada = [await receive_data(ada) for _ in range(4)]
            assert [m["type"] for m in seen_by_ada] == ["INSERT", "INSERT", "UPDATE", "UPDATE"]
            assert seen_by_ada[0]["record"]["title"] == "private"
            seen_by_bob = [await receive_data(bob) for _ in range(3)]
            assert [m["type"] for m in seen_by_bob] == ["INSERT", "DELETE", "INSERT"]
            assert (seen_by_bob[1]["old_record"], seen_by_bob[1]["left"]) == ({"id": public}, True)
            assert [seen_by_bob[i]["record"]["id"] for i in (0, 2)] == [public, private]


@pytest.mark.parametrize("way", SUPABASE_WAYS[:1], indirect=True)
async def test_three_settings_are_enough(way: Way) -> None:
    """The project's address, its key and the rules; the project itself says whose tokens are good."""
    async with way.upstream("public.posts") as settings:
        three = {name: settings[name] for name in ("SUPABASE_URL", "SUPABASE_KEY")}
        unset = {"SUPABASE_JWT_SECRET": "", "BRIDGE_PUBLICATION": ""}
        async with (
            BridgeProcess("", BRIDGE_POLICIES=RULES, **three, **unset) as bridge,
            open_socket(bridge.url, token(ADA)) as ada,
        ):
            assert (await receive(ada))["type"] == "ready"
            connection = await asyncpg.connect(way.database)
            await connection.execute(
                "insert into posts (user_id, title) values ($1, 'of bob'), ($2, 'of ada')", BOB, ADA
            )
            await connection.close()
            assert (await receive_data(ada))["record"]["title"] == "of ada"
            async with open_socket(
                bridge.url, token(ADA, secret="another secret, as long as it has to be")
            ) as stranger:
                with pytest.raises(ConnectionClosed) as closed:
                    await receive(stranger)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4401
