"""`realtime-bridge dev`: what it starts works, shows each user what is theirs, and is gone when told to go."""

import random
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection

from realtime_bridge.dev.users import sample_users
from realtime_bridge.dev.writer import FEWEST_ROWS, MOST_ROWS, Step, next_step
from tests.clients import bearer, open_socket, receive, receive_data
from tests.demos import Demo
from tests.services import eventually

pytestmark = pytest.mark.integration


async def post(url: str, user: Any, title: str, *, is_public: bool) -> None:
    async with httpx.AsyncClient(headers=bearer(user["token"])) as http:
        answer = await http.post(f"{url}/posts", json={"title": title, "is_public": is_public})
        assert answer.status_code == 201, answer.text


async def titles(socket: ClientConnection, last: str) -> list[str]:
    """The titles that arrive, up to the one that is awaited."""
    found: list[str] = []
    while last not in found:
        found.append((await receive_data(socket, 20))["record"]["title"])
    return found


def other_url(demo: Demo) -> str:
    """The address of the second bridge."""
    addresses = re.findall(r"http://127\.0\.0\.1:\d+", demo.errors.replace("\n", ""))
    return str(addresses[-1])


@pytest.mark.parametrize(
    "arguments", [(), ("--redis",), ("--source", "supabase"), ("--source", "supabase", "--redis")], ids=" ".join
)
async def test_each_user_is_shown_their_own_and_public_rows_and_nothing_else(arguments: tuple[str, ...]) -> None:
    with Demo("--no-writer", *arguments) as demo:
        env = await demo.ready()
        assert set(env) == {"url", "database_url", "redis_url", "jwt_secret", "service_key", "anon_key", "users"}
        assert (env["redis_url"] is None) == ("--redis" not in arguments)
        ada, bob = env["users"]
        url = env["url"]
        read_from = other_url(demo) if "--redis" in arguments else url
        assert (read_from != url) == ("--redis" in arguments)
        async with open_socket(read_from, ada["token"]) as adas, open_socket(read_from, bob["token"]) as bobs:
            for one in (adas, bobs):
                assert (await receive(one))["type"] == "ready"
            await post(url, ada, "ada's secret", is_public=False)
            await post(url, bob, "bob's secret", is_public=False)
            await post(url, ada, "ada's news", is_public=True)
            await post(url, bob, "bob's news", is_public=True)
            assert await titles(adas, "bob's news") == ["ada's secret", "ada's news", "bob's news"]
            assert await titles(bobs, "bob's news") == ["bob's secret", "ada's news", "bob's news"]
        demo.signal(signal.SIGTERM)
        assert await demo.ended() == 0, demo.errors
        assert demo.leaves_nothing()
        assert demo.output.count("\n") == 1


async def test_the_page_can_sign_in_as_the_users_whom_the_writer_keeps_busy() -> None:
    with Demo("--users", "3") as demo:
        env = await demo.ready()
        async with httpx.AsyncClient(base_url=env["url"]) as http:
            page = await http.get("/")
            assert page.headers["content-type"].startswith("text/html")
            users = (await http.get("/dev/users.json")).json()
        assert [user["email"] for user in users] == ["ada@example.com", "bob@example.com", "cleo@example.com"]
        assert [user["id"] for user in users] == [user.id for user in sample_users(3)]
        ada = users[0]
        async with open_socket(env["url"], ada["token"]) as socket:
            assert (await receive(socket))["type"] == "ready"
            for _ in range(3):
                message = await receive_data(socket, 30)
                record = message.get("record", {"user_id": ada["id"]})
                assert record["user_id"] == ada["id"] or record["is_public"]
            demo.signal(signal.SIGINT)  # with a client connected
            assert await demo.ended() == 0, demo.errors
        assert demo.leaves_nothing()


@pytest.mark.parametrize("numbers", [(signal.SIGHUP,), (signal.SIGINT, signal.SIGINT)], ids=["hang-up", "twice"])
async def test_signals_end_it_while_it_starts(numbers: tuple[signal.Signals, ...]) -> None:
    with Demo() as demo:
        await eventually(lambda: "Postgres" in demo.errors, timeout=30)
        for number in numbers:
            demo.signal(number)
        assert await demo.ended() == 0, demo.errors
        assert demo.leaves_nothing()


def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "realtime_bridge", "dev", "--port", port]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(rf"realtime-bridge: port {port} cannot be used .*--port 0\n", result.stderr)


def test_the_writer_stays_within_its_bounds() -> None:
    dice = random.Random(1)
    rows, seen = 0, set()
    for _ in range(1_000):
        step = next_step(rows, dice)
        seen.add(step)
        rows += {Step.WRITE: 1, Step.DELETE: -1}.get(step, 0)
        assert rows <= MOST_ROWS
    assert rows >= FEWEST_ROWS
    assert seen == set(Step)
