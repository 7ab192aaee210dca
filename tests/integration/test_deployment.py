"""The deployment of docker-compose.yml, started natively: the very nginx.conf before two bridges with a Valkey, on a
Postgres made by the very SQL. What would need Docker to be proven (the images) is read and compared instead."""

import asyncio
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
import typer
import yaml  # type: ignore[import-untyped]  # it ships no types
from dotenv import dotenv_values
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Origin

from realtime_bridge.cli import cli
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.processes import EmbeddedServer
from realtime_bridge.errors import ConfigurationError
from realtime_bridge.server import server_config
from realtime_bridge.settings import Settings, describe
from realtime_bridge.transports.events import MAX_WAIT_SECONDS
from tests.bridges import BridgeProcess, environment
from tests.clients import Copy, bearer, http, open_socket, receive, receive_data
from tests.services import eventually, running, token

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
NGINX = (ROOT / "deploy/nginx.conf").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SAMPLES = {name: value or "" for name, value in dotenv_values(ROOT / ".env.example").items()}
BRIDGES = ("bridge-a", "bridge-b")
ADA = str(uuid.UUID(int=1))
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}")


def filled_in(text: str) -> str:
    """A value of docker-compose.yml as compose reads it with the samples."""
    return VARIABLE.sub(lambda match: SAMPLES[match[1]] or match[2] or "", text)


ENVIRONMENT = {name: filled_in(value) for name, value in SERVICES["bridge-a"]["environment"].items()}
SECRET = ENVIRONMENT["SUPABASE_JWT_SECRET"]
LOGIN = urlsplit(ENVIRONMENT["DATABASE_URL"]).username or ""
DEFAULT_PUBLICATION = Settings.model_fields["publication"].default

# -- the same topology, natively ---------------------------------------------------------------------------------------


class Nginx(EmbeddedServer):
    """nginx with deploy/nginx.conf, where only the addresses are others, as an ordinary user in a folder of its own."""

    name: ClassVar[str] = "nginx"
    unprivileged: ClassVar[bool] = True

    def __init__(self, *bridges: int) -> None:
        self._bridges = dict(zip(BRIDGES, bridges, strict=True))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
        if program is None:
            raise ConfigurationError("nginx is not installed: apt-get install nginx-light")
        self._program = program
        text = NGINX.replace("listen 8080;", f"listen 127.0.0.1:{self.port};")
        for name, port in self._bridges.items():
            text = text.replace(f"{name}:8000 resolve ", f"127.0.0.1:{port} ")
        assert "bridge-" not in text, "an address was not replaced"
        (self.directory / "nginx.conf").write_text(text)
        (self.directory / "log").touch()  # /dev/stdout is opened by name, and so has to belong to the one who opens it
        self._folder.hand_over(self.directory)

    def _command(self) -> Sequence[str | Path]:
        return [self._program, "-e", "stderr", "-p", self.directory, "-c", self.directory / "nginx.conf"]

    def _is_ready(self) -> bool:
        return (self.directory / "nginx.pid").exists() and "start worker process" in self.log

    @property
    def answers(self) -> list[dict[str, str]]:
        """Its access log."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith('{"time"')]


@pytest.fixture(scope="module")
def deployed_postgres() -> Iterator[EmbeddedPostgres]:
    """A Postgres with the settings that compose gives it, initialised by the files that compose mounts."""
    words = SERVICES["postgres"]["command"][1:]
    options = dict(word.split("=") for word in words if word != "-c")
    with running(EmbeddedPostgres(options=options)) as server:
        secrets = {name: filled_in(value) for name, value in SERVICES["postgres"]["environment"].items()}
        for file in mounted("postgres", "/docker-entrypoint-initdb.d/"):
            arguments = ["--no-psqlrc", "--set=ON_ERROR_STOP=1", f"--file={ROOT / file}", server.dsn()]
            command = [str(server._bin / "psql"), *arguments]
            subprocess.run(command, env={**os.environ, **secrets}, check=True, stdout=subprocess.DEVNULL)
        yield server


@dataclass
class Deployment:
    nginx: Nginx
    bridges: list[BridgeProcess]
    database: str

    @property
    def url(self) -> str:
        return self.nginx.url

    async def write(self, title: str) -> int:
        """Commit a post of Ada's; its id."""
        connection = await asyncpg.connect(self.database)
        try:
            statement = "insert into posts (user_id, title) values ($1, $2) returning id"
            return int(await connection.fetchval(statement, ADA, title))
        finally:
            await connection.close()

    async def connections(self) -> list[int]:
        """How many each bridge has open."""
        counts = []
        for bridge in self.bridges:
            async with http(bridge.url) as client:
                page = (await client.get("/metrics")).text
                counts += [float(n) for n in re.findall(r"^realtime_bridge_connections ([\d.]+)", page, re.M)]
        return [int(count) for count in counts]


@pytest.fixture
async def deployment(deployed_postgres: EmbeddedPostgres, redis_url: str, namespace: str) -> AsyncIterator[Deployment]:
    """Two bridges as compose configures them, with nginx before them. Only what a machine decides is another."""
    settings = ENVIRONMENT | {
        "REDIS_URL": redis_url,
        "BRIDGE_NAMESPACE": namespace,
        "BRIDGE_SLOT": namespace.replace("-", "_"),
        "BRIDGE_PUBLICATION": DEFAULT_PUBLICATION,
        "BRIDGE_PING_SECONDS": "1",
    }
    del settings["DATABASE_URL"]
    database = deployed_postgres.dsn(user=LOGIN)
    async with BridgeProcess(database, **settings) as one, BridgeProcess(database, **settings) as other:
        with running(Nginx(one.port, other.port)) as nginx:
            yield Deployment(nginx, [one, other], deployed_postgres.dsn())


def my_token() -> str:
    return token(ADA, secret=SECRET)


async def test_websocket_and_long_poll_bring_the_same_change_through_nginx(deployment: Deployment) -> None:
    poller = Copy(deployment.url, my_token())
    await poller.load()
    async with open_socket(deployment.url, my_token()) as socket, httpx.AsyncClient(timeout=20) as client:
        assert (await receive(socket))["type"] == "ready"
        polling = asyncio.ensure_future(poller.poll(client, wait=20))
        id_ = await deployment.write("to both")
        pushed = await receive_data(socket)
        assert await polling
        assert pushed == poller.history[-1]
        assert pushed["record"]["id"] == id_
        assert (await client.get(f"{deployment.url}/healthz")).status_code == 200
        assert (await client.get(f"{deployment.url}/metrics")).status_code == 404


# Server-Sent Events through nginx: a test against the bridge itself belongs here. That nginx hands on an event at once
# is proven below, by `test_nginx_hands_on_an_event_before_the_answer_ends`.


async def test_pings_flow_through_nginx(deployment: Deployment) -> None:
    async with open_socket(deployment.url, my_token()) as socket:
        assert (await receive(socket))["ping_seconds"] == 1
        pings = [await receive(socket) for _ in range(2)]
        assert [message["type"] for message in pings] == ["ping", "ping"]
        assert all(message["complete_until"] for message in pings)


async def test_a_page_of_the_same_host_may_connect_through_nginx_and_another_may_not(deployment: Deployment) -> None:
    address = deployment.url.replace("http", "ws", 1) + "/ws"
    headers = bearer(my_token())
    async with connect(address, additional_headers=headers, origin=Origin(deployment.url)) as socket:
        assert (await receive(socket))["type"] == "ready"
    stranger = Origin(deployment.url.replace("127.0.0.1", "evil.example"))
    async with connect(address, additional_headers=headers, origin=stranger) as socket:
        with pytest.raises(ConnectionClosed):
            await receive(socket)
        assert socket.close_code == 4403


class Reader:
    """Follows through nginx and comes back, with its position, whenever its link ends."""

    def __init__(self, url: str) -> None:
        self.copy = Copy(url, my_token())
        self.codes: list[int | None] = []

    async def run(self) -> None:
        while True:
            async with open_socket(self.copy.url, self.copy.token, position=self.copy.position) as socket:
                try:
                    while True:
                        await self.copy.take(await receive(socket, 60))
                except ConnectionClosed:
                    self.codes.append(socket.close_code)

    @property
    def titles(self) -> list[str]:
        return [message["record"]["title"] for message in self.copy.history]


@pytest.mark.fault
async def test_clients_of_a_stopped_bridge_go_on_at_the_other_without_loss(deployment: Deployment) -> None:
    readers = [Reader(deployment.url) for _ in range(6)]
    for reader in readers:
        await reader.copy.load()
    written = [f"post {n}" for n in range(60)]
    async with asyncio.TaskGroup() as tasks:
        reading = [tasks.create_task(reader.run()) for reader in readers]
        await eventually(_equal_shares(deployment, 3))
        for title in written[:20]:
            await deployment.write(title)
        stopping = tasks.create_task(asyncio.to_thread(deployment.bridges[0].stop))
        for title in written[20:]:
            await deployment.write(title)
        assert await stopping in (0, -signal.SIGTERM)  # drained, not killed: uvicorn then ends by the signal itself
        await eventually(lambda: all(len(reader.titles) >= len(written) for reader in readers), 30)
        for task in reading:
            task.cancel()
    assert [reader.titles for reader in readers] == [written] * len(readers)
    assert sorted(reader.codes for reader in readers) == [[]] * 3 + [[1012]] * 3
    assert not any(reader.copy.resyncs for reader in readers)
    assert not [answer for answer in deployment.nginx.answers if answer["status"] == "502"]


def _equal_shares(deployment: Deployment, each: int) -> Callable[[], Awaitable[bool]]:
    async def shared() -> bool:
        return await deployment.connections() == [each] * len(deployment.bridges)

    return shared


async def test_a_reload_of_nginx_ends_no_socket(deployment: Deployment) -> None:
    async with open_socket(deployment.url, my_token()) as socket:
        await receive(socket)
        os.kill(deployment.nginx.pid, signal.SIGHUP)
        await eventually(lambda: "gracefully shutting down" in deployment.nginx.log)
        await deployment.write("after the reload")
        assert (await receive_data(socket))["record"]["title"] == "after the reload"
        async with open_socket(deployment.url, my_token()) as another:
            assert (await receive(another))["type"] == "ready"


async def test_no_log_holds_a_token(deployment: Deployment) -> None:
    secret = my_token()
    places = ("/ws", "/events", "/posts", "/nowhere", "/metrics")
    paths = [f"{path}?{name}={secret}&wait=0" for name in ("token", "ticket") for path in places]
    address = deployment.url.replace("http", "ws", 1) + paths[0]
    async with httpx.AsyncClient(base_url=deployment.url, timeout=20) as client:
        async with connect(address) as socket:
            assert (await receive(socket))["type"] == "ready"
        for path in paths:
            await client.get(path, headers={"Referer": deployment.url + path})
        for bridge in deployment.bridges:
            bridge.stop()
        assert {(await client.get(path)).status_code for path in paths} == {502, 404}
    logs = deployment.nginx.log + "".join(bridge.log for bridge in deployment.bridges)
    assert secret.rpartition(".")[2] not in logs
    assert not re.search("token=|ticket=", deployment.nginx.log)
    assert {"/ws", "/events"} <= {a["path"] for a in deployment.nginx.answers if a["status"] == "502"}


def test_check_finds_nothing_to_mend_in_the_deployment(deployed_postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    words = SERVICES["valkey"]["command"][1:]
    options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    with running(EmbeddedValkey(options=options)) as valkey:
        settings = ENVIRONMENT | {"REDIS_URL": valkey.url, "BRIDGE_PUBLICATION": DEFAULT_PUBLICATION}
        database = deployed_postgres.dsn(user=LOGIN)
        given = environment(database, **{name: value for name, value in settings.items() if name != "DATABASE_URL"})
        command = [sys.executable, "-m", "realtime_bridge", "check", "--json"]
        report = json.loads(subprocess.run(command, env=given, cwd=tmp_path, capture_output=True).stdout)
    assert [finding for finding in report["findings"] if finding["status"] != "ok"] == []
    assert report["ok"]


# -- what nginx says to a bridge ---------------------------------------------------------------------------------------


class Upstream:
    """Stands where a bridge would, and keeps what it is asked."""

    def __init__(self) -> None:
        self.requests: list[dict[str, str]] = []
        self.finish = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        self.requests.append({"line": lines[0], **headers})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: 1\n\n")
        await self.finish.wait()
        writer.close()


@asynccontextmanager
async def before_an_upstream() -> AsyncIterator[tuple[Nginx, Upstream]]:
    upstream = Upstream()
    server = await asyncio.start_server(upstream.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with running(Nginx(port, port)) as nginx:
            yield nginx, upstream
            upstream.finish.set()


async def test_nginx_hands_on_an_event_before_the_answer_ends() -> None:
    async with before_an_upstream() as (nginx, upstream), httpx.AsyncClient(timeout=10) as client:
        async with client.stream("GET", f"{nginx.url}/events") as response:
            assert await anext(response.aiter_bytes()) == b"data: 1\n\n"
            assert not upstream.finish.is_set()


async def test_nginx_tells_the_bridge_whom_it_speaks_for() -> None:
    claimed = {"Host": "api.example.com:8443", "X-Forwarded-For": "6.6.6.6", "X-Forwarded-Proto": "https"}
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade"}
    async with before_an_upstream() as (nginx, upstream), httpx.AsyncClient(timeout=10) as client:
        upstream.finish.set()
        await client.get(f"{nginx.url}/posts", headers=claimed)
        await client.get(f"{nginx.url}/ws?position=x-1", headers=claimed | upgrade)
    plain, socket = upstream.requests
    for request in (plain, socket):
        assert request["host"] == "api.example.com:8443"
        assert request["x-forwarded-for"] == "127.0.0.1"
        assert request["x-forwarded-proto"] == "http"
        assert request["line"].endswith("HTTP/1.1")
    assert "connection" not in plain
    assert (socket["upgrade"], socket["connection"]) == ("websocket", "upgrade")
    assert "/ws?position=x-1" in socket["line"]


# -- the files agree with each other and with the code -----------------------------------------------------------------


def mounted(service: str, target: str) -> list[str]:
    """The files of this repository that a service finds under `target`, in the order in which it finds them."""
    volumes = [volume.split(":") for volume in SERVICES[service].get("volumes", [])]
    found = sorted((place, file) for file, place, *_ in volumes if file.startswith("./") and place.startswith(target))
    return [file for _, file in found]


def seconds(text: str) -> float:
    return float(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


def test_nginx_waits_for_longer_than_the_bridge_is_ever_silent() -> None:
    silence = max(2 * Settings.model_fields["ping_seconds"].default, MAX_WAIT_SECONDS)
    timeouts = dict(re.findall(r"^\s+((?:proxy_read|proxy_send|send)_timeout) (\d+[sm]);", NGINX, re.M))
    assert len(timeouts) == 3
    for name, value in timeouts.items():
        assert seconds(value) > silence, name


def test_nginx_leaves_an_idle_connection_before_the_bridge_does() -> None:
    config = server_config(Settings.load(env_file=None, whole=False), host="127.0.0.1", port=0)
    found = re.search(r"^\s+keepalive_timeout (\d+s);", NGINX, re.M)
    assert found is not None
    assert seconds(found[1]) < config.timeout_keep_alive


def test_every_variable_of_compose_has_a_sample_and_every_sample_a_use() -> None:
    used = {match[1] for match in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text())}
    assert used == set(SAMPLES)


def test_secrets_of_the_samples_are_plainly_samples() -> None:
    for name, value in SAMPLES.items():
        assert "SAMPLE" in value or not re.search("SECRET|PASSWORD|KEY|TOKEN", name), name


def test_compose_gives_the_bridge_nothing_that_it_does_not_know() -> None:
    known = set(re.findall(r"^\| `(\w+)`", describe(), re.M))
    assert set(ENVIRONMENT) <= known
    assert SERVICES["bridge-a"] == SERVICES["bridge-b"]


def test_a_bridge_has_time_to_drain_before_it_is_killed() -> None:
    assert seconds(SERVICES["bridge-a"]["stop_grace_period"]) > float(SAMPLES["BRIDGE_DRAIN_SECONDS"])
    assert seconds(SERVICES["bridge-a"]["stop_grace_period"]) > Settings.model_fields["drain_seconds"].default


def test_every_service_has_a_check_and_comes_back() -> None:
    for name, service in SERVICES.items():
        assert service["healthcheck"]["test"], name
        assert service["restart"] == "unless-stopped", name
        assert not service.get("image", "").endswith(":latest"), name
    assert "/readyz" in SERVICES["bridge-a"]["healthcheck"]["test"][-1]


def test_every_file_that_compose_mounts_exists() -> None:
    files = [file for name in SERVICES for file in mounted(name, "/")]
    assert sorted(files) == [
        "./deploy/nginx.conf",
        "./deploy/postgres/20-bridge.sql",
        "./realtime_bridge/dev/schema.sql",
    ]
    assert all((ROOT / file).is_file() for file in files)


def test_the_image_is_built_from_files_that_exist_and_that_docker_is_shown() -> None:
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.M)
        for source in line.split()[:-1]
    ]
    shown = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source.removeprefix("./"), pattern) for pattern in shown), source


def test_the_image_runs_a_command_that_exists_as_an_ordinary_user() -> None:
    text = (ROOT / "Dockerfile").read_text()
    program, *rest = [word for name in ("ENTRYPOINT", "CMD") for word in json.loads(_instruction(text, name))]
    assert program == "realtime-bridge"
    _parse(rest)
    assert int(_instruction(text, "USER")) > 0


def _instruction(text: str, name: str) -> str:
    found = re.findall(rf"^{name} (.*)$", text, re.M)
    return str(found[-1])


def _parse(words: Sequence[str]) -> None:
    """Refuse what the command line would refuse; runs nothing."""
    command = typer.main.get_command(cli)
    name, *arguments = words
    known = command.commands  # type: ignore[attr-defined]  # a group, as there are several
    assert name in known, f"no such command: {name}"
    known[name].make_context(name, list(arguments))


def test_every_command_in_the_documents_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()
        blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", text))
        for line in blocks.splitlines():
            for command in re.findall(r"(?:^|[\s(])realtime-bridge ((?:[a-z-]+)(?: [^#|&;)…>]*)?)", line):
                _parse(command.split())
            for target in re.findall(r"^make ([a-z]+)", line):
                assert target in targets, f"{path.name}: make {target}"
