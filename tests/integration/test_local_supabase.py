"""The local Supabase as others use it: through the official clients, and frame by frame."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from realtime import AsyncRealtimeClient, RealtimePostgresChangesListenEvent
from realtime.types import PostgresChangesPayload
from supabase import AsyncClient, AsyncClientOptions, acreate_client
from supabase_auth.errors import AuthInvalidJwtError
from websockets.asyncio.client import connect

from realtime_bridge.dev.supabase import LocalSupabase
from tests.services import SECRET, eventually, token

pytestmark = [
    pytest.mark.integration,
    # supabase 2.34.1 hands its own PostgREST client arguments that that client has deprecated.
    pytest.mark.filterwarnings("ignore:The '(timeout|verify)' parameter is deprecated:DeprecationWarning:supabase"),
]

SERVICE_KEY = "sb_secret_service"
ANON_KEY = "sb_publishable_anon"


def local(dsn: str, **others: Any) -> LocalSupabase:
    return LocalSupabase(dsn, jwt_secret=SECRET, service_key=SERVICE_KEY, anon_key=ANON_KEY, **others)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def client_of(supabase: LocalSupabase, key: str) -> AsyncIterator[AsyncClient]:
    options = AsyncClientOptions(auto_refresh_token=False, persist_session=False)
    client = await acreate_client(supabase.url, key, options)
    try:
        yield client
    finally:
        await client.postgrest.aclose()
        await client.auth.close()


async def insert(connection: "asyncpg.Connection[asyncpg.Record]", title: str) -> int:
    number: int = await connection.fetchval(
        "insert into posts (user_id, title) values ($1, $2) returning id", uuid4(), title
    )
    return number


async def titles(client: AsyncClient, query: str) -> list[str]:
    """The titles of posts that an address' query asks for, in order."""
    rows = await client.postgrest.session.get("posts", params=query)
    assert rows.status_code == 200, rows.text
    return [row["title"] for row in rows.json()]


async def test_it_reads_tables_through_the_official_client(database: str) -> None:
    async with local(database) as supabase, connected(database) as db, client_of(supabase, SERVICE_KEY) as client:
        numbers = [await insert(db, title) for title in ("a", "b,c", "d")]
        every = await client.table("posts").select("*").order("id", desc=True).limit(2).execute()
        assert [post["id"] for post in every.data] == numbers[:0:-1]  # type: ignore[index,call-overload]
        second = await client.table("posts").select("id, title").order("id").range(1, 1).execute()
        assert second.data == [{"id": numbers[1], "title": "b,c"}]
        some = await client.table("posts").select("*").gt("id", numbers[0]).in_("title", ["a", "b,c"]).execute()
        assert [post["title"] for post in some.data] == ["b,c"]  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("title=eq.a", ["a"]),
        ("title=neq.a&order=id", ["b", "c"]),
        ("title=lt.c&order=title.desc", ["b", "a"]),
        ("title=lte.b&title=gte.b", ["b"]),
        ("is_public=is.true", ["c"]),
        ("is_public=is.false&order=title.asc&limit=1", ["a"]),
        ("body=is.null", []),
        ("select=title&order=is_public.desc,title&offset=1", ["a", "b"]),
        ("title=in.(a,c)&order=title", ["a", "c"]),
    ],
)
async def test_it_understands_filters_and_orders(database: str, query: str, expected: list[str]) -> None:
    async with local(database) as supabase, connected(database) as db, client_of(supabase, SERVICE_KEY) as client:
        for title in ("a", "b", "c"):
            await insert(db, title)
        await db.execute("update posts set is_public = true where title = 'c'")
        assert await titles(client, query) == expected


async def test_it_answers_no_more_than_a_thousand_rows_as_a_project_does(database: str) -> None:
    async with local(database) as supabase, connected(database) as db, client_of(supabase, SERVICE_KEY) as client:
        await db.execute(
            "insert into posts (user_id, title) select $1, n::text from generate_series(1, 1005) n", uuid4()
        )
        assert len(await titles(client, "order=id")) == 1000
        assert len(await titles(client, "order=id&offset=1000")) == 5


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("posts", ANON_KEY, 401),
        ("absent", SERVICE_KEY, 404),
        ("posts?id=eq.x", SERVICE_KEY, 400),
        ("posts?id=like.1", SERVICE_KEY, 400),
        ("posts?title=is.true", SERVICE_KEY, 400),
        ("posts?absent=eq.1", SERVICE_KEY, 400),
        ("posts?select=users(*)", SERVICE_KEY, 400),
        ("posts?order=id.sideways", SERVICE_KEY, 400),
    ],
)
async def test_it_refuses_what_it_does_not_understand(database: str, path: str, key: str, status: int) -> None:
    async with local(database) as supabase, httpx.AsyncClient(base_url=f"{supabase.url}/rest/v1/") as http:
        assert (await http.get(path, headers={"apikey": key})).status_code == status


async def test_it_knows_users_by_their_tokens(database: str) -> None:
    subject = str(uuid4())
    async with local(database) as supabase, client_of(supabase, ANON_KEY) as client:
        known = await client.auth.get_user(token(subject, email="a@example.com"))
        assert known is not None
        assert (known.user.id, known.user.email) == (subject, "a@example.com")
        async with httpx.AsyncClient(base_url=f"{supabase.url}/auth/v1/") as http:
            for bad in ("x.y.z", token(subject, secret="another-secret-of-more-than-32-bytes"), token(subject, ttl=-1)):
                answer = await http.get("user", headers={"Authorization": f"Bearer {bad}"})
                assert answer.status_code == 401


async def test_it_publishes_keys_and_takes_others_for_them(database: str) -> None:
    first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))

    def public(key: ec.EllipticCurvePrivateKey, kid: str) -> dict[str, Any]:
        return {**ECAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "alg": "ES256", "use": "sig"}

    def signed(key: ec.EllipticCurvePrivateKey, kid: str) -> str:
        claims = jwt.decode(token("ada"), options={"verify_signature": False})
        return jwt.encode(claims, key, algorithm="ES256", headers={"kid": kid})

    async with local(database, jwks=[public(first, "one")]) as supabase:
        async with client_of(supabase, ANON_KEY) as client:
            found = await client.auth.get_claims(signed(first, "one"))
            assert found is not None
            assert found["claims"]["sub"] == "ada"
        supabase.set_jwks([public(second, "two")])
        async with client_of(supabase, ANON_KEY) as client:
            assert await client.auth.get_claims(signed(second, "two")) is not None
            with pytest.raises(AuthInvalidJwtError):
                await client.auth.get_claims(signed(first, "one"))


# -- misbehaving: what the bridge makes of it, tests/faults shows ------------------------------------------------------


def title_in(payload: PostgresChangesPayload) -> str:
    return str((payload["data"].get("record") or {})["title"])


@asynccontextmanager
async def listening(supabase: LocalSupabase) -> AsyncIterator[list[str]]:
    """The titles that the official client, left to itself, is told of; what it says of its state among them."""
    heard: list[str] = []
    client = AsyncRealtimeClient(f"{supabase.url}/realtime/v1", SERVICE_KEY, initial_backoff=0.1)
    channel = client.channel("room").on_system(lambda payload: heard.append(payload.message))
    every = RealtimePostgresChangesListenEvent.All
    channel.on_postgres_changes(every, lambda payload: heard.append(title_in(payload)), table="posts")
    await channel.subscribe(lambda state, _: heard.append(state.value))
    await eventually(lambda: len(heard) == 2)
    assert heard == ["SUBSCRIBED", "Subscribed to PostgreSQL"]
    heard.clear()
    try:
        yield heard
    finally:
        await client.close()


async def test_it_drops_delays_and_repeats_as_told(database: str) -> None:
    async with local(database) as supabase, connected(database) as db, listening(supabase) as heard:
        supabase.drop(2)
        for title in ("dropped", "dropped too", "told"):
            await insert(db, title)
        await eventually(lambda: heard == ["told"])
        supabase.delay(0.3)
        supabase.repeat(2)
        for title in ("one", "two", "three"):
            await insert(db, title)
        await eventually(lambda: len(heard) == 6)
    assert heard == ["told", "one", "two", "three", "one", "two"]


async def test_a_frozen_one_is_neither_heard_nor_hears_until_it_thaws(database: str) -> None:
    async with local(database) as supabase, connected(database) as db, listening(supabase) as heard:
        supabase.freeze()
        await insert(db, "held back")
        async with httpx.AsyncClient(base_url=supabase.url, timeout=0.3) as http:
            with pytest.raises(httpx.ReadTimeout):
                await http.get("/auth/v1/.well-known/jwks.json")
        assert heard == []
        supabase.thaw()
        await eventually(lambda: heard == ["held back"])


async def test_a_restarted_one_is_back_at_the_same_address(database: str) -> None:
    async with local(database) as supabase, httpx.AsyncClient(base_url=supabase.url) as http:
        restarting = asyncio.create_task(supabase.restart(0.3))
        await asyncio.sleep(0)
        with pytest.raises(httpx.ConnectError):
            await http.get("/")
        await restarting
        assert (await http.get("/")).status_code == 404


@pytest.mark.filterwarnings("ignore:ConnectionClosed.(code|reason) is deprecated:DeprecationWarning:websockets")
async def test_what_it_says_of_a_channel_reaches_the_client(database: str) -> None:
    async with local(database) as supabase, connected(database) as db, listening(supabase) as heard:
        supabase.resubscribe()
        await eventually(lambda: heard == ["Subscribed to PostgreSQL"])
        heard.clear()
        supabase.oversize()
        await insert(db, "too large")
        await eventually(lambda: heard == ["CHANNEL_ERROR", "SUBSCRIBED", "Subscribed to PostgreSQL"])
        heard.clear()
        supabase.refuse_joins("RealtimeRestarting: soon")
        supabase.system_error()
        await eventually(lambda: heard == ["CHANNEL_ERROR", "CHANNEL_ERROR"])
        supabase.refuse_joins(None)
        # Joined anew on a connection that still has the channel: the client takes the earlier one's close for its own.
        await eventually(lambda: heard[2:] == ["SUBSCRIBED", "CLOSED"])


async def test_a_channel_that_it_closes_is_closed_for_the_client(database: str) -> None:
    async with local(database) as supabase, listening(supabase) as heard:
        supabase.phx_close()
        await eventually(lambda: heard == ["CLOSED"])


# -- frame by frame --------------------------------------------------------------------------------------------------


async def test_it_speaks_the_second_version_of_the_protocol(database: str) -> None:
    async with local(database) as supabase, connected(database) as db:
        address = supabase.url.replace("http", "ws") + f"/realtime/v1/websocket?apikey={SERVICE_KEY}&vsn=2.0.0"
        async with connect(address) as client, asyncio.timeout(10):
            binding = {"event": "INSERT", "schema": "public", "table": "posts"}
            config = {"config": {"postgres_changes": [binding]}}
            await client.send(orjson.dumps(["1", "1", "realtime:room", "phx_join", config]).decode())
            reply = orjson.loads(await client.recv())
            (answered,) = reply[4]["response"]["postgres_changes"]
            assert reply[:4] == ["1", "1", "realtime:room", "phx_reply"]
            assert answered == {**binding, "id": answered["id"]}
            assert orjson.loads(await client.recv())[4]["message"] == "Subscribed to PostgreSQL"
            number = await insert(db, "hello")
            *head, payload = orjson.loads(await client.recv())
            assert head == [None, None, "realtime:room", "postgres_changes"]
            assert payload["ids"] == [answered["id"]]
            assert payload["data"]["record"]["id"] == number
            assert payload["data"].keys() == {
                "schema",
                "table",
                "commit_timestamp",
                "type",
                "errors",
                "columns",
                "record",
            }
            await client.send(orjson.dumps([None, "2", "phoenix", "heartbeat", {}]).decode())
            assert orjson.loads(await client.recv()) == [
                None,
                "2",
                "phoenix",
                "phx_reply",
                {"status": "ok", "response": {}},
            ]
            await client.send(orjson.dumps(["1", "3", "realtime:room", "phx_leave", {}]).decode())
            assert orjson.loads(await client.recv())[3] == "phx_reply"
            assert orjson.loads(await client.recv()) == ["1", "1", "realtime:room", "phx_close", {}]


async def test_it_closes_the_earlier_of_two_joins_as_the_real_server_does(database: str) -> None:
    join = {"topic": "realtime:room", "event": "phx_join", "payload": {"config": {}}}
    async with local(database) as supabase:
        address = supabase.url.replace("http", "ws") + f"/realtime/v1/websocket?apikey={ANON_KEY}"
        async with connect(address) as client, asyncio.timeout(10):
            await client.send("not a frame")
            await client.send(orjson.dumps({**join, "ref": "0", "event": "presence"}).decode())
            for ref in ("1", "2"):
                await client.send(orjson.dumps({**join, "ref": ref}).decode())
            await client.send(orjson.dumps({**join, "ref": "3", "topic": "elsewhere"}).decode())
            frames = [orjson.loads(await client.recv()) for _ in range(5)]
    assert [(frame["event"], frame["ref"]) for frame in frames] == [
        ("phx_reply", "0"),
        ("phx_reply", "1"),
        ("phx_reply", "2"),
        ("phx_close", "1"),
        ("phx_reply", "3"),
    ]
    assert [frame["payload"].get("status") for frame in frames] == ["error", "ok", "ok", None, "error"]


async def test_it_subscribes_again_for_a_new_token_and_closes_for_a_worse_one(database: str) -> None:
    async with local(database) as supabase:
        address = supabase.url.replace("http", "ws") + f"/realtime/v1/websocket?apikey={ANON_KEY}&vsn=2.0.0"
        async with connect(address) as client, asyncio.timeout(10):
            config = {"postgres_changes": [{"event": "*", "schema": "public", "table": "posts"}]}
            payload = {"config": config, "access_token": token(None, role="service_role")}
            await client.send(orjson.dumps(["1", "1", "realtime:room", "phx_join", payload]).decode())
            for text in (SERVICE_KEY, SERVICE_KEY, ANON_KEY):
                refresh = {"access_token": text}
                await client.send(orjson.dumps(["1", None, "realtime:room", "access_token", refresh]).decode())
            frames = [orjson.loads(await client.recv()) for _ in range(5)]
    assert [frame[3] for frame in frames] == ["phx_reply", "system", "system", "system", "phx_close"]
    assert [frame[4]["status"] for frame in frames[1:4]] == ["error", "ok", "error"]


async def test_it_leaves_no_slot_behind(database: str) -> None:
    async with connected(database) as db:
        async with local(database):
            assert (
                await db.fetchval("select count(*) from pg_replication_slots where database = current_database()") == 1
            )

        async def gone() -> bool:
            slots = "select count(*) from pg_replication_slots where database = current_database()"
            return bool(await db.fetchval(slots) == 0)

        await eventually(gone)
