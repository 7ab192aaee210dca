"""`realtime-bridge tail` as a person or a script runs it, against a real bridge."""

import asyncio
import fcntl
import json
import os
import pty
import re
import signal
import ssl
import struct
import subprocess
import sys
import termios
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import IO, Any

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from realtime_bridge.dev.processes import reserve_port
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, BridgeProcess
from tests.clients import Copy, open_socket, read_posts, receive_data
from tests.services import eventually, token

pytestmark = pytest.mark.integration

ADA, BOB = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
POSITION = re.compile(r"^resume with --position (\S+)$", re.MULTILINE)


class Tail:
    """A running `tail`. What it writes to files of the folder can be read at any time.

    Args:
        output: in place of a file.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        credential: str = token(ADA),
        output: IO[bytes] | int | None = None,
        given: str | None = None,
    ) -> None:
        self._output = folder / f"{uuid.uuid4()}.out"
        self._errors = self._output.with_suffix(".err")
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        with self._output.open("wb") as file, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "realtime_bridge", "tail", *arguments],
                env={**kept, "REALTIME_BRIDGE_TOKEN": credential, "TERM": "xterm-256color"},
                stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
                stdout=file if output is None else output,
                stderr=errors,
                start_new_session=True,
            )
        if given is not None:
            assert self.process.stdin is not None
            self.process.stdin.write(f"{given}\n".encode())
            self.process.stdin.close()

    @property
    def lines(self) -> list[str]:
        """Whole lines of standard output."""
        return self._output.read_text().split("\n")[:-1]

    @property
    def titles(self) -> list[str]:
        """Of the rows in those lines."""
        return [json.loads(line).get("record", {}).get("title") for line in self.lines]

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    @property
    def position(self) -> str:
        """Where it says to resume."""
        (position,) = POSITION.findall(self.errors)
        return str(position)

    async def has(self, titles: Sequence[str], timeout: float = 30) -> None:
        """Wait for exactly these rows."""

        def is_enough() -> bool:
            assert self.process.poll() is None, self.errors
            return len(self.titles) >= len(titles)

        await eventually(is_enough, timeout)
        assert self.titles == list(titles)

    async def ended(self, number: signal.Signals | None = None) -> int:
        """The exit status, after a signal if one is given."""
        if number is not None:
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 30)


@contextmanager
def tailing(folder: Path, *arguments: str, **options: Any) -> Iterator[Tail]:
    tail = Tail(folder, *arguments, **options)
    try:
        yield tail
    finally:
        tail.process.kill()
        tail.process.wait(5)


@asynccontextmanager
async def bridge_on(database: str, **settings: str) -> AsyncIterator[BridgeProcess]:
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    async with BridgeProcess(database, **settings) as bridge:
        yield bridge


@asynccontextmanager
async def connected(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(database)
    try:
        yield connection
    finally:
        await connection.close()


async def insert(connection: "asyncpg.Connection[asyncpg.Record]", *titles: str, user: str = ADA) -> None:
    for title in titles:
        await connection.execute("insert into posts (user_id, title) values ($1, $2)", user, title)


async def start_of(bridge: BridgeProcess) -> list[str]:
    """Arguments that follow the bridge from this moment on, whenever the process has started."""
    _, position = await read_posts(bridge.url, token(ADA))
    return ["--url", bridge.url, "--position", position]


# -- for programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_lines_are_the_messages_as_they_came_and_a_signal_ends_with_the_position_to_resume_from(
    number: signal.Signals, database: str, tmp_path: Path
) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        start = await start_of(bridge)
        await insert(db, "one")
        await db.execute("update posts set title = 'two', body = E'two\\nlines'")
        await db.execute("delete from posts")
        await insert(db, "of another", user=BOB)
        await insert(db, "three")
        with tailing(tmp_path, *start) as tail:
            await eventually(lambda: len(tail.lines) == 4, 30)
            assert await tail.ended(number) == 0
            assert tail.errors.count("\n") == 1
        async with open_socket(bridge.url, token(ADA), position=start[-1]) as socket:
            assert tail.lines == [json.dumps(await receive_data(socket), separators=(",", ":")) for _ in range(4)]
        assert json.loads(tail.lines[-1])["position"] == tail.position

        await insert(db, "while away")
        with tailing(tmp_path, "--url", bridge.url, "--position", tail.position) as resumed:
            await resumed.has(["while away"])
            await insert(db, "live")
            await resumed.has(["while away", "live"])


@pytest.mark.parametrize("way", ["SIGTERM", "SIGKILL"])
async def test_a_restart_of_the_bridge_is_bridged(
    way: str, database: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    settings = {"REDIS_URL": redis_url, "BRIDGE_NAMESPACE": namespace, "BRIDGE_SLOT": namespace.replace("-", "_")}
    async with bridge_on(database, **settings) as bridge, connected(database) as db:
        with tailing(tmp_path, *await start_of(bridge)) as tail:
            await insert(db, "before")
            await tail.has(["before"])
            bridge.kill() if way == "SIGKILL" else bridge.stop()
            await insert(db, "meanwhile")
            await eventually(lambda: "; again in " in tail.errors)
            bridge.start()
            await bridge.ready()
            await insert(db, "after")
            await tail.has(["before", "meanwhile", "after"], 60)
            assert await tail.ended(signal.SIGINT) == 0


async def test_it_waits_for_a_bridge_that_is_not_there_yet(tmp_path: Path) -> None:
    with reserve_port() as holder:
        port = holder.getsockname()[1]
        with tailing(tmp_path, "--url", f"http://127.0.0.1:{port}") as tail:
            await eventually(lambda: tail.errors.count("no connection: Connection refused; again in ") >= 2, 30)
            assert await tail.ended(signal.SIGINT) == 0
    assert "resume" not in tail.errors


async def test_a_resync_is_a_line_too(database: str, tmp_path: Path) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        with tailing(tmp_path, *await start_of(bridge)) as tail:
            await db.execute("truncate posts")
            await eventually(lambda: tail.lines, 30)
            (message,) = map(json.loads, tail.lines)
            assert (message["type"], message["reason"]) == ("resync", "truncated")


async def test_only_what_matches_the_filter_is_shown(database: str, tmp_path: Path) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        filter_ = ["--table", "posts", "--filter", "title=in.(one,three)"]
        with tailing(tmp_path, *await start_of(bridge), *filter_) as tail:
            await insert(db, "one", "two", "three")
            await tail.has(["one", "three"])


@asynccontextmanager
async def secured(port: int, folder: Path) -> AsyncIterator[str]:
    """The https address of a relay to a port; its certificate, which nobody knows yet, is in the folder."""
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bridge")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, None)
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "certificate.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")

    async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                target.write(data)
        target.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, there), carry(back, writer))

    async with await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context) as server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_https_is_followed_where_the_certificate_holds_and_nowhere_else(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bridge_on(database) as bridge, connected(database) as db, secured(bridge.port, tmp_path) as url:
        position = (await start_of(bridge))[-1]
        await insert(db, "secret")
        with tailing(tmp_path, "--url", url) as stranger:
            assert await stranger.ended() == 1
        assert re.fullmatch(r"realtime-bridge: no connection: .*certificate verify failed.*\n", stranger.errors)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        with tailing(tmp_path, "--url", url, "--position", position) as tail:
            await tail.has(["secret"])
            assert await tail.ended(signal.SIGINT) == 0


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["environment", "standard input"])
async def test_a_bad_token_ends_it_with_one_sentence(way: str, database: str, tmp_path: Path) -> None:
    bad = token(ADA, secret="another-secret-of-more-than-32-bytes-altogether")
    if way == "environment":
        arguments, options = [], {"credential": bad}
    else:
        arguments, options = ["--token", "-"], {"given": bad}
    async with bridge_on(database) as bridge:
        with tailing(tmp_path, "--url", bridge.url, *arguments, **options) as tail:
            assert await tail.ended() == 1
        assert bad not in bridge.log
    assert tail.errors == "realtime-bridge: the bridge asks for another token: token refused: signature.\n"


@pytest.mark.slow
async def test_the_end_of_a_token_ends_it_with_the_position_and_another_token_goes_on(
    database: str, tmp_path: Path
) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        start = await start_of(bridge)
        short = token(ADA, ttl=15)
        with tailing(tmp_path, *start, credential=short) as tail:
            await insert(db, "before")
            await tail.has(["before"])
            assert await tail.ended() == 1
        assert tail.errors.endswith("\nrealtime-bridge: the bridge asks for another token: token expired.\n")
        await insert(db, "after")
        with tailing(tmp_path, "--url", bridge.url, "--position", tail.position) as resumed:
            await resumed.has(["after"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--table", "nothing"], "table: public.nothing is not served here"),
        (["--filter", "id=beats.1"], "filter: beats is not an operator here"),
        (["--position", "yesterday"], "position: not a position of this bridge"),
    ],
)
async def test_what_the_bridge_does_not_understand_is_said_once(
    arguments: list[str], reason: str, database: str, tmp_path: Path
) -> None:
    async with bridge_on(database) as bridge:
        with tailing(tmp_path, "--url", bridge.url, *arguments) as tail:
            assert await tail.ended() == 1
    assert tail.errors.startswith(f"realtime-bridge: the bridge refuses: {reason}")
    assert tail.errors.count("\n") == 1


async def test_something_that_is_no_bridge_is_told(database: str, tmp_path: Path) -> None:
    async with bridge_on(database) as bridge:
        with tailing(tmp_path, "--url", f"{bridge.url}/elsewhere") as tail:
            assert await tail.ended() == 1
    assert re.fullmatch(r"realtime-bridge: no bridge answers there, but HTTP status 40\d\.\n", tail.errors)


# -- whoever reads it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [True, False], ids=["changes go on", "nothing more happens"])
async def test_a_reader_that_has_enough_ends_it(more: bool, database: str, tmp_path: Path) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        start = await start_of(bridge)
        await insert(db, "one")
        head = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with tailing(tmp_path, *start, output=head.stdin) as tail:
            assert head.stdin is not None
            head.stdin.close()
            head.stdin = None
            line, _ = await asyncio.to_thread(head.communicate, None, 30)
            assert json.loads(line)["record"]["title"] == "one"
            if more:
                await insert(db, "two")
            assert await tail.ended() == 0
        assert tail.position == json.loads(line)["position"]
        assert tail.errors.count("\n") == 1


async def test_a_reader_that_stands_still_does_not_keep_a_signal_from_being_heard(
    database: str, tmp_path: Path
) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        start = await start_of(bridge)
        reading, writing = os.pipe()
        with tailing(tmp_path, *start, output=writing) as tail, os.fdopen(reading, "rb") as stalled:
            os.close(writing)
            capacity = fcntl.fcntl(stalled, fcntl.F_SETPIPE_SZ, 4096)
            await insert(db, "x" * 2 * capacity)

            def is_full() -> bool:
                (waiting,) = struct.unpack("i", fcntl.ioctl(stalled, termios.FIONREAD, bytes(4)))
                return int(waiting) == capacity

            await eventually(is_full, 30)
            assert await tail.ended(signal.SIGTERM) == 0
            assert b"\n" not in stalled.read()
    assert tail.position == start[-1], "what was cut off comes again"


async def test_a_full_disk_is_told(database: str, tmp_path: Path) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        start = await start_of(bridge)
        await insert(db, "one")
        with Path("/dev/full").open("wb") as full, tailing(tmp_path, *start, output=full) as tail:
            assert await tail.ended() == 1
    assert tail.errors.endswith("realtime-bridge: standard output: No space left on device.\n")


# -- for people --------------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal for a process to write to, and all that it has written."""

    def __init__(self) -> None:
        self._master, self.end = pty.openpty()
        os.set_blocking(self._master, False)
        self._content = b""

    def close(self) -> None:
        os.close(self._master)

    @property
    def content(self) -> str:
        with suppress(BlockingIOError, OSError):
            while part := os.read(self._master, 65536):
                self._content += part
        return self._content.decode()


async def test_a_terminal_shows_colours_and_no_row_can_write_to_it(database: str, tmp_path: Path) -> None:
    terminal = Terminal()
    async with bridge_on(database) as bridge, connected(database) as db:
        with tailing(tmp_path, *await start_of(bridge), output=terminal.end) as tail:
            os.close(terminal.end)
            await insert(db, "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m")
            await db.execute("update posts set title = 'tame'")
            await db.execute("delete from posts")
            await insert(db, "the end")
            await eventually(lambda: "the end" in terminal.content, 30)
            assert await tail.ended(signal.SIGINT) == 0
        shown = terminal.content
        terminal.close()
    for colour, operation in (("32", "INSERT"), ("33", "UPDATE"), ("31", "DELETE")):
        assert f"\x1b[1;{colour}m{operation} " in shown
    assert "\x1b[2mready at " in shown
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown).replace("\r\n", "\n")
    assert all(line.isprintable() for line in plain.split("\n"))
    assert r'title="\u001b]0;owned\u0007\u001b[2J\u202e\x9b31m" → "tame"' in plain
    assert POSITION.search(tail.errors)


async def test_a_terminal_of_few_letters_shows_the_others_escaped(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    terminal = Terminal()
    async with bridge_on(database) as bridge, connected(database) as db:
        with tailing(tmp_path, *await start_of(bridge), output=terminal.end) as tail:
            os.close(terminal.end)
            await insert(db, "é")
            await eventually(lambda: r'"\xe9"' in terminal.content, 30)
            assert await tail.ended(signal.SIGINT) == 0
        terminal.close()


async def test_a_terminal_that_goes_away_ends_it(database: str, tmp_path: Path) -> None:
    terminal = Terminal()
    async with bridge_on(database) as bridge, connected(database) as db:
        start = await start_of(bridge)
        await insert(db, "one")
        with tailing(tmp_path, *start, output=terminal.end) as tail:
            os.close(terminal.end)
            await eventually(lambda: "one" in terminal.content, 30)
            terminal.close()
            assert await tail.ended() == 0
    assert POSITION.search(tail.errors)


async def test_a_copy_folded_from_the_lines_equals_the_table(database: str, tmp_path: Path) -> None:
    async with bridge_on(database) as bridge, connected(database) as db:
        with tailing(tmp_path, *await start_of(bridge)) as tail:
            await insert(db, *(str(n) for n in range(30)))
            await db.execute("update posts set title = title || '!' where id % 2 = 0")
            await db.execute("delete from posts where id % 3 = 0")
            await insert(db, "the end")
            await eventually(lambda: tail.titles[-1:] == ["the end"], 30)
        copy = Copy(bridge.url, token(ADA))
        for line in tail.lines:
            await copy.take(json.loads(line))
        rows, _ = await read_posts(bridge.url, token(ADA))
        assert copy.rows == rows
