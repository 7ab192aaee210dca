import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from fastapi import FastAPI

from realtime_bridge.auth import Verifier, require_claims
from realtime_bridge.change import Column, Relation
from realtime_bridge.claims import Claims
from realtime_bridge.database import Database
from realtime_bridge.rest import problems
from realtime_bridge.rest.application import install
from realtime_bridge.rest.posts import POSITION_HEADER, posts_router
from realtime_bridge.values import encode_image
from tests.services import SECRET, PgBouncer, running, token

pytestmark = pytest.mark.integration

ANN = "aaaaaaaa-0000-4000-8000-000000000001"
BOB = "bbbbbbbb-0000-4000-8000-000000000002"


def as_login(dsn: str) -> str:
    parts = urlsplit(dsn)
    return parts._replace(netloc=f"authenticator@{parts.hostname}:{parts.port}").geturl()


def client(app: FastAPI, sub: str | None = None, role: str = "authenticated", **claims: Any) -> httpx.AsyncClient:
    """Somebody who talks to the application; without `sub` and with the usual role, without a token."""
    headers = {}
    if sub is not None or role != "authenticated":
        headers["Authorization"] = f"Bearer {token(sub, role, **claims)}"
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://bridge", headers=headers)


async def anywhere(claims: Claims) -> str:
    return "test-1"


def application(database: Database, position: Callable[[Claims], Awaitable[str]] = anywhere) -> FastAPI:
    """A stranger's application: it includes the router, and knows nothing of our errors."""
    app = FastAPI()
    app.include_router(posts_router(lambda: database, require_claims(Verifier(secret=SECRET)), position), prefix="/api")
    return app


@asynccontextmanager
async def serving(dsn: str, *, max_size: int = 5) -> AsyncIterator[FastAPI]:
    async with Database(as_login(dsn), max_size=max_size) as database:
        yield application(database)


async def write(http: httpx.AsyncClient, title: str, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/api/posts", json={"title": title, **fields})
    assert answer.status_code == 201, answer.text
    post: dict[str, Any] = answer.json()
    return post


def assert_problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert set(body) == {"type", "title", "status", "detail"}
    return body


# -- what a caller can do ----------------------------------------------------------------------------------------------


async def test_a_post_is_written_read_changed_and_deleted_by_its_owner(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        post = await write(ann, "first", body="text")
        assert (post["user_id"], post["title"], post["body"], post["is_public"]) == (ANN, "first", "text", False)
        address = f"/api/posts/{post['id']}"
        assert (await ann.get(address)).json() == post

        changed = (await ann.patch(address, json={"title": "second", "is_public": True})).json()
        assert (changed["title"], changed["body"], changed["is_public"]) == ("second", "text", True)
        assert changed["updated_at"] > post["updated_at"]

        gone = await ann.delete(address)
        assert (gone.status_code, gone.content) == (204, b"")
        assert_problem(await ann.get(address), 404)


async def test_two_users_neither_see_nor_write_each_others_posts(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann, client(app, BOB) as bob:
        hers, his = await write(ann, "hers"), await write(bob, "his")
        assert (await ann.get("/api/posts")).json() == [hers]
        assert (await bob.get("/api/posts")).json() == [his]
        address = f"/api/posts/{hers['id']}"
        assert_problem(await bob.get(address), 404)
        assert_problem(await bob.patch(address, json={"title": "mine"}), 404)
        assert_problem(await bob.delete(address), 404)
        assert (await ann.get(address)).json() == hers


async def test_a_post_that_others_see_is_still_not_theirs_to_change(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann, client(app, BOB) as bob:
        post = await write(ann, "shown", is_public=True)
        address = f"/api/posts/{post['id']}"
        assert (await bob.get(address)).json() == post
        assert_problem(await bob.patch(address, json={"title": "mine"}), 403)
        assert_problem(await bob.delete(address), 403)
        assert (await ann.get(address)).json() == post


async def test_the_anonymous_may_read_what_is_public_and_write_nothing(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann, client(app, role="anon", aud=None) as anon:
        shown, hidden = await write(ann, "shown", is_public=True), await write(ann, "hidden")
        assert (await anon.get("/api/posts")).json() == [shown]
        assert_problem(await anon.get(f"/api/posts/{hidden['id']}"), 404)
        assert_problem(await anon.post("/api/posts", json={"title": "x"}), 403)
        assert_problem(await anon.patch(f"/api/posts/{shown['id']}", json={"title": "x"}), 403)
        assert_problem(await anon.delete(f"/api/posts/{shown['id']}"), 403)


async def test_a_row_reads_as_in_a_live_message(database: str) -> None:
    columns = {
        "id": "int8",
        "user_id": "uuid",
        "title": "text",
        "body": "text",
        "is_public": "bool",
        "created_at": "timestamptz",
        "updated_at": "timestamptz",
    }
    relation = Relation("public", "posts", tuple(Column(*pair) for pair in columns.items()), (0,), True)
    async with serving(database) as app, client(app, ANN) as ann:
        post = await write(ann, 'quotes " \\ \u2028 😀', body="two\nlines")
        with psycopg.connect(database, autocommit=True, options="-c TimeZone=UTC") as admin:
            for stamp in ("2026-01-02 03:04:05.678901+00", "2026-01-02 03:04:05.6+00", "2026-01-02 03:04:05+00"):
                admin.execute("update public.posts set created_at = %s", [stamp])
                image = admin.execute(
                    f"select {','.join(f'{name}::text' for name in columns)} from public.posts".encode()
                )
                row = list(image.fetchone() or ())
                row[4] = row[4][0]  # the output function of bool writes one letter, its cast to text a word
                answer = await ann.get(f"/api/posts/{post['id']}")
                assert answer.json() == json.loads(encode_image(relation, tuple(row)))
                assert answer.json()["created_at"] == stamp.replace(" ", "T") + ":00"


async def test_lists_are_paged_by_key(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann, client(app, BOB) as bob:
        for number in range(5):
            await write(ann, str(number))
            await write(bob, "between")
        seen, address = [], "/api/posts?limit=2"
        while address:
            page = await ann.get(address)
            seen.append([post["title"] for post in page.json()])
            address = str(page.url.join(page.links["next"]["url"])) if "next" in page.links else ""
        assert seen == [["0", "1"], ["2", "3"], ["4"]]
        assert (await ann.get(f"/api/posts?after={2**63 - 1}")).json() == []


async def test_a_token_in_the_address_does_not_reach_the_link_header(database: str) -> None:
    async with Database(as_login(database)) as opened:
        app = FastAPI()
        dependency = require_claims(Verifier(secret=SECRET), token_in_query=True)
        app.include_router(posts_router(lambda: opened, dependency, anywhere), prefix="/api")
        async with client(app, ANN) as ann, client(app) as nobody:
            await write(ann, "one")
            await write(ann, "two")
            page = await nobody.get("/api/posts", params={"limit": 1, "token": token(ANN)})
    assert len(page.json()) == 1
    assert "token" not in page.headers["link"]


async def test_reads_carry_the_position_from_before_their_snapshot(database: str) -> None:
    async with Database(as_login(database)) as opened:
        positions: list[str] = []

        async def position(_: Claims) -> str:
            """Every call sees another write; it must be in the answer if the position is older than the snapshot."""
            with psycopg.connect(database, autocommit=True) as admin:
                admin.execute("insert into public.posts (user_id, title) values (%s, 'x')", [ANN])
            positions.append(f"test-{len(positions) + 1}")
            return positions[-1]

        async with client(application(opened, position), ANN) as ann:
            for number in (1, 2):
                page = await ann.get("/api/posts")
                assert (page.headers[POSITION_HEADER], len(page.json())) == (f"test-{number}", number)
            one = await ann.get("/api/posts/3")
            assert (one.headers[POSITION_HEADER], one.status_code) == ("test-3", 200)
            assert POSITION_HEADER not in (await ann.patch("/api/posts/3", json={"title": "y"})).headers


# -- what it refuses ---------------------------------------------------------------------------------------------------


async def test_without_a_good_token_nothing_is_answered(database: str) -> None:
    async with serving(database) as app:
        for http in (client(app), client(app, ANN, ttl=-60), client(app, ANN, secret="x" * 40)):
            async with http:
                for method, address in [("GET", "/api/posts"), ("POST", "/api/posts"), ("DELETE", "/api/posts/1")]:
                    answer = await http.request(method, address, json={"title": "x"} if method == "POST" else None)
                    assert_problem(answer, 401)
                    assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_signed_role_that_may_not_connect_is_forbidden(database: str) -> None:
    async with serving(database) as app:
        for role in ("postgres", "service_role", "authenticator", "none", "anon; set role postgres"):
            async with client(app, ANN, role) as http:
                assert_problem(await http.get("/api/posts"), 403)


async def test_a_role_that_verification_lets_through_is_still_bound_by_the_login_role(database: str) -> None:
    async with Database(as_login(database)) as opened:
        app = FastAPI()
        careless = require_claims(Verifier(secret=SECRET, roles=["postgres", "none"]))
        app.include_router(posts_router(lambda: opened, careless, anywhere), prefix="/api")
        for role in ("postgres", "none"):
            async with client(app, ANN, role) as http:
                assert_problem(await http.get("/api/posts"), 403)


_NO_POSTS: list[Any] = [
    {},
    {"title": ""},
    {"title": "x" * 201},
    {"title": "a\x00b"},
    {"title": None},
    {"title": 7},
    {"title": "x", "body": "y" * 100_001},
    {"title": "x", "body": "\x00"},
    {"title": "x", "is_public": "yes"},
    {"title": "x", "user_id": BOB},
    {"title": "x", "id": 1},
    [],
    "x",
    None,
]


async def test_a_body_that_is_not_a_post_is_refused_with_a_reason(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        post = await write(ann, "good")
        for body in _NO_POSTS:
            assert "body" in assert_problem(await ann.post("/api/posts", json=body), 422)["detail"]
            assert_problem(await ann.patch(f"/api/posts/{post['id']}", json=body), 422)
        assert_problem(await ann.patch(f"/api/posts/{post['id']}", json={"body": None}), 422)
        assert (await ann.get("/api/posts")).json() == [post]


async def test_the_name_of_an_unknown_field_is_not_repeated_at_length(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        for name in ("\\ud800", "x" * 5000):
            content = f'{{"title":"x","{name}":1}}'
            answer = await ann.post("/api/posts", content=content, headers={"content-type": "application/json"})
            assert len(assert_problem(answer, 422)["detail"]) < 200


async def test_a_body_that_is_no_json_is_refused(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        for content in (b"{", b"\xff", b'{"title":"\\ud800"}', b"", b"[" * 100_000):
            answer = await ann.post("/api/posts", content=content, headers={"content-type": "application/json"})
            assert answer.status_code in (400, 422)
            assert_problem(answer, answer.status_code)


async def test_a_body_without_end_is_refused_before_it_fills_the_memory(database: str) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 2**16

    async with serving(database) as app, client(app, ANN) as ann:
        # ASGITransport would read all of the body first: speak ASGI ourselves.
        messages, stream = [], endless()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": await anext(stream), "more_body": True}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/api/posts",
            "query_string": b"",
            "headers": [
                (b"authorization", ann.headers["authorization"].encode()),
                (b"content-type", b"application/json"),
            ],
        }
        await app(scope, receive, send)
    assert messages[0]["status"] == 413
    assert sent * 2**16 < 2 * problems.LARGEST_BODY


_OUT_OF_RANGE = [
    "/api/posts/abc",
    f"/api/posts/{2**63}",
    f"/api/posts/{-(2**63) - 1}",
    f"/api/posts/{'9' * 5000}",
    "/api/posts/1.5",
    "/api/posts/%00",
    "/api/posts?limit=0",
    "/api/posts?limit=1001",
    f"/api/posts?after={2**63}",
    "/api/posts?after=x",
]


async def test_a_number_out_of_range_is_refused_with_its_name(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        for address in _OUT_OF_RANGE:
            detail = assert_problem(await ann.get(address), 422)["detail"]
            assert any(name in detail for name in ("path.id:", "query.limit:", "query.after:"))


async def test_identifiers_reach_the_ends_of_their_type(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        for number in (2**63 - 1, -(2**63), 0):
            assert_problem(await ann.get(f"/api/posts/{number}"), 404)


async def test_what_looks_like_sql_is_only_text(database: str) -> None:
    text = "'); drop table public.posts; -- $1 \\ \" {} %s"
    async with serving(database) as app, client(app, ANN, email=text, name=text) as ann:
        post = await write(ann, text, body=text)
        assert (post["title"], post["body"]) == (text, text)
        assert (await ann.get("/api/posts")).json() == [post]


async def test_a_subject_that_is_no_uuid_is_told_so_and_nothing_more(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann, client(app, "' or true --") as odd:
        await write(ann, "hers")
        detail = assert_problem(await odd.get("/api/posts"), 400)["detail"]
        assert "or true" not in detail


# -- many at once ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True], ids=["direct", "pooled"])
async def test_interleaved_requests_of_two_users_never_mix(database: str, pooled: bool) -> None:
    async def visit(http: httpx.AsyncClient, sub: str, number: int) -> None:
        post = await write(http, f"{sub} {number}")
        assert post["user_id"] == sub
        rows = (await http.get("/api/posts?limit=1000")).json()
        assert post in rows
        assert {row["user_id"] for row in rows} == {sub}

    async def visits(dsn: str) -> None:
        async with (
            serving(dsn, max_size=2) as app,
            client(app, ANN) as ann,
            client(app, BOB) as bob,
            asyncio.TaskGroup() as tasks,
        ):
            for number in range(50):
                http, sub = ((ann, ANN), (bob, BOB))[number % 2]
                tasks.create_task(visit(http, sub, number))

    if pooled:
        with running(PgBouncer(database, pool_size=2)) as bouncer:
            await visits(bouncer.dsn)
    else:
        await visits(database)


# -- when Postgres fails -----------------------------------------------------------------------------------------------


async def test_a_postgres_that_refuses_is_a_503_to_be_tried_again(database: str) -> None:
    async with serving(database) as app, client(app, ANN) as ann:
        with psycopg.connect(database, autocommit=True) as admin:
            admin.execute("drop table public.posts")
        answer = await ann.get("/api/posts")
        assert_problem(answer, 503)
        assert int(answer.headers["retry-after"]) > 0


# -- an application of our own -----------------------------------------------------------------------------------------


async def test_an_application_with_our_handlers_answers_every_error_with_a_problem(database: str) -> None:
    async with serving(database) as app:

        @app.get("/number/{number}")
        async def number(number: int) -> int:
            return 1 // number

        install(app, lambda origin, host: True)

        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://bridge") as http:
            assert_problem(await http.get("/nowhere"), 404)
            assert assert_problem(await http.put("/number/1"), 405)["title"] == "Method Not Allowed"
            assert (await http.put("/number/1")).headers["allow"] == "GET"
            assert_problem(await http.get("/number/x"), 422)
            assert "division" not in assert_problem(await http.get("/number/0"), 500)["detail"]
            assert_problem(await http.get("/api/posts"), 401)


async def test_the_routes_describe_themselves(database: str) -> None:
    async with serving(database) as app:
        described = app.openapi()
    assert set(described["paths"]) == {"/api/posts", "/api/posts/{id}"}
    assert described["paths"]["/api/posts"]["get"]["security"] == [{"HTTPBearer": []}]
