"""`realtime-bridge tail`: changes as they come, coloured for a person at a terminal, else JSON lines for a program.

A reader of `/ws` like any other: it holds one position, comes back with it after every loss, and obeys the close codes.
It blocks where it waits, so that Ctrl-C is heard at once, also while nobody takes what it writes. A position counts
only once its line is written: what is cut off in between comes again, and is never missing.

Layer: whole. May import: errors.
Sources: docs/protocol.md; RFC 6455 section 7.4 (close codes).
"""

import json
import os
import random
import re
import select
import shlex
import signal
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from decimal import Decimal
from io import TextIOWrapper
from typing import Annotated, Any, Final, NoReturn, TypeAlias
from urllib.parse import urlencode, urlsplit

import typer
from rich.console import Console
from rich.text import Text
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import Close
from websockets.sync.client import ClientConnection, connect

from realtime_bridge.errors import BridgeError, ConfigurationError

Message: TypeAlias = Mapping[str, Any]
Show: TypeAlias = Callable[[bytes, Message], None]

TOKEN_VARIABLE: Final = "REALTIME_BRIDGE_TOKEN"  # noqa: S105 - a name; one with BRIDGE_ would be a setting of `serve`
_SCHEMES: Final = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}

_FIRST_BACKOFF_SECONDS: Final = 0.5
_LONGEST_WAIT_SECONDS: Final = 30.0
_STABLE_SECONDS: Final = 10.0
"""A connection that lived so long makes the next wait start small again."""
_LOOK_SECONDS: Final = 1.0
"""How long a silent table may hide that nobody reads our output any more."""
_CLOSE_SECONDS: Final = 1.0
_LARGEST_MESSAGE: Final = 256 * 2**20

_ANOTHER_TOKEN: Final = 4401
_NEVER_AGAIN: Final = frozenset({1007, 1009, 4400, 4403, 4413})
_LATER: Final = frozenset({408, 425, 429})
"""Of the HTTP statuses below 500, those that something before the bridge may take back."""
_RETRY_IN: Final = re.compile(r"retry in (\d{1,9}) ms")

_LONGEST_VALUE: Final = 80
_COLOURS: Final = {"INSERT": "green", "UPDATE": "yellow", "DELETE": "red"}


def tail(
    url: Annotated[
        str, typer.Option(help="The bridge's address: http://, https://, ws:// or wss://.")
    ] = "http://127.0.0.1:8000",
    token: Annotated[
        str | None,
        typer.Option(
            envvar=TOKEN_VARIABLE,
            help="A user's access token; `-` reads it from standard input. Others on this machine can see what stands "
            "in a command line: the variable keeps it to yourself.",
        ),
    ] = None,
    table: Annotated[
        list[str] | None, typer.Option(help="`schema.table`; may be repeated. All that the bridge serves if left out.")
    ] = None,
    filter_: Annotated[
        str | None, typer.Option("--filter", help="For the one table: `column=op.value`, comma-separated, as for /ws.")
    ] = None,
    position: Annotated[str | None, typer.Option(help="Read on from here, not from the present.")] = None,
) -> None:
    """Show changes as they come, until Ctrl-C; then say from where to resume.

    On a terminal in colours, else as JSON lines: changes and resyncs as the bridge sent them, and nothing else.
    """
    interest = [("table", name) for name in table or ()] + ([("filter", filter_)] if filter_ else [])
    show = show_on_terminal() if sys.stdout.isatty() else write_line
    follower = Follower(socket_address(url), interest, read_token(token), show)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        follower.follow(position)
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # the two ways in which it is meant to end
    except OSError as error:
        raise _EndedError(f"standard output: {error.strerror}.") from None
    finally:
        if follower.position is not None:
            say(f"resume with --position {shlex.quote(printable(follower.position))}")


# -- what it was called with -------------------------------------------------------------------------------------------


def socket_address(url: str) -> str:
    """The address of the bridge's WebSocket.

    Raises:
        typer.BadParameter: `url` is not the address of a bridge, or says more than that: a token has no place in it.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # is read here, and may be none
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise typer.BadParameter("no address that begins with http://, https://, ws:// or wss://", param_hint="--url")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise typer.BadParameter("the address alone: the token has an option of its own", param_hint="--url")
    return f"{_SCHEMES[parts.scheme]}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/ws')}/ws"


def read_token(given: str | None) -> str:
    """The token, from standard input if it is `-`.

    Raises:
        ConfigurationError: there is none.
        typer.BadParameter: it cannot be one; it is not repeated.
    """
    token = (sys.stdin.readline() if given == "-" else given or "").strip()
    if not token:
        raise ConfigurationError(f"{TOKEN_VARIABLE} or --token is missing: rows are shown as a user may see them.")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise typer.BadParameter("this is no token", param_hint="--token")
    return token


# -- following ---------------------------------------------------------------------------------------------------------


class _EndedError(BridgeError):
    """There is no going on, however often it is tried."""


class Follower:
    """Reads on from a position, over as many connections as it takes.

    Args:
        address: as of `socket_address`.
        interest: the parameters of the address that say what to follow.
        show: writes a message out. What it raises ends the following.

    Attributes:
        position: up to which everything was shown; None until the bridge has told one.
    """

    def __init__(self, address: str, interest: Sequence[tuple[str, str]], token: str, show: Show) -> None:
        self.position: str | None = None
        self._address = address
        self._interest = interest
        self._headers = {"Authorization": f"Bearer {token}"}
        self._show = show

    def follow(self, start: str | None) -> NoReturn:
        """Show what comes after a position (None: the present), and connect again whenever the connection is lost.

        Raises:
            _EndedError: trying again cannot help.
            BrokenPipeError: nobody reads what is written.
            KeyboardInterrupt: by a signal.
        """
        failures = 0
        while True:
            require_reader()
            began = time.monotonic()
            loss = self._connection(self.position or start)
            if loss.final:
                raise _EndedError(f"{loss.reason}.")
            failures = 0 if time.monotonic() - began > _STABLE_SECONDS else failures
            wait = backoff(failures) if loss.retry_seconds is None else loss.retry_seconds
            failures += 1
            say(f"{loss.reason}; again in {wait:.1f} s")
            time.sleep(wait)

    def _connection(self, position: str | None) -> "Loss":
        """One connection, from its opening to its loss."""
        query = [*self._interest, *([("position", position)] if position else [])]
        try:
            socket = connect(
                f"{self._address}?{urlencode(query)}",
                additional_headers=self._headers,
                compression=None,
                close_timeout=_CLOSE_SECONDS,
                max_size=_LARGEST_MESSAGE,
            )
        except (OSError, WebSocketException) as error:
            return not_opened(error)
        with closing(socket):
            try:
                while True:
                    self._take(socket)
            except ConnectionClosed as error:
                return closed(error.rcvd or error.sent)

    def _take(self, socket: ClientConnection) -> None:
        try:
            raw = socket.recv(_LOOK_SECONDS, decode=False)
        except TimeoutError:
            require_reader()
            return
        message = parse(raw)
        match message.get("type"):
            case "error":
                say(f"the bridge refuses: {printable(str(message.get('detail')))}")
            case "auth_expiring":
                say(f"the token ends at {printable(str(message.get('expires_at')))}")
            case _:
                self._show(raw, message)
        if isinstance(position := message.get("position"), str):
            self.position = position


@dataclass(frozen=True)
class Loss:
    """Why there is no connection.

    Attributes:
        final: another try would end the same.
        retry_seconds: when the bridge asks for the next one, if it does.
    """

    reason: str
    final: bool = False
    retry_seconds: float | None = None


def closed(frame: Close | None) -> Loss:
    """What a close frame means; None is a connection that ended without one."""
    if frame is None:
        return Loss("the connection was lost")
    told = printable(frame.reason) or f"close code {frame.code}"
    if frame.code == _ANOTHER_TOKEN:
        return Loss(f"the bridge asks for another token: {told}", final=True)
    if frame.code in _NEVER_AGAIN:
        return Loss(f"the bridge refuses: {told}", final=True)
    retry = _RETRY_IN.search(frame.reason) if frame.code in (1001, 1012) else None
    seconds = None if retry is None else min(int(retry[1]) / 1000, _LONGEST_WAIT_SECONDS)
    return Loss(f"the bridge ended the connection ({told})", retry_seconds=seconds)


def not_opened(error: OSError | WebSocketException) -> Loss:
    """Why a connection could not be made."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        final = status < 500 and status not in _LATER
        return Loss(f"no bridge answers there, but HTTP status {status}", final=final)
    told = error.strerror if isinstance(error, OSError) else None
    reason = printable(told or str(error) or type(error).__name__)
    return Loss(f"no connection: {reason}", final=isinstance(error, ssl.SSLCertVerificationError))


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row, with full jitter."""
    longest = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10), _LONGEST_WAIT_SECONDS)
    return random.uniform(0, longest)


# -- for programs ------------------------------------------------------------------------------------------------------


def parse(raw: bytes) -> Message:
    """A message of the bridge, numbers with all their digits; empty if it cannot be read as one."""
    try:
        message = json.loads(raw, parse_float=Decimal)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def is_for_programs(message: Message) -> bool:
    """Changes and resyncs are; so is what cannot be read here, since another may read it."""
    kind = message.get("type")
    return kind == "resync" or not (isinstance(kind, str) and kind.islower())


def write_line(raw: bytes, message: Message) -> None:
    """Write a message as it came. Nothing of it is kept back in a buffer.

    Raises:
        BrokenPipeError: nobody reads it.
    """
    if is_for_programs(message):
        rest = memoryview(raw + b"\n")
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]


def require_reader() -> None:
    """Make sure that somebody could read what is written, without writing.

    Raises:
        BrokenPipeError: nobody can.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        raise BrokenPipeError


def say(sentence: str) -> None:
    """Tell whoever started us; standard output is for messages alone."""
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"{sentence}\n".encode())


# -- for people --------------------------------------------------------------------------------------------------------


def show_on_terminal() -> Show:
    """A `Show` that writes lines in colours."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a row may hold what the terminal's encoding does not
    console = Console(highlight=False, soft_wrap=True)

    def show(raw: bytes, message: Message) -> None:
        line = render(raw, message)
        if line is not None:
            console.print(line)

    return show


def render(raw: bytes, message: Message) -> Text | None:
    """A message as one line for a person, or None if it is none for people.

    Whatever rows hold, nothing in the line is a control character, nor any other that a terminal would act on.
    """
    match message.get("type"):
        case "INSERT" | "UPDATE" | "DELETE" as operation:
            return Text.assemble(*_change(operation, message))
        case "ready":
            tables = ", ".join(map(str, message.get("tables") or ()))
            return Text(printable(f"ready at {message.get('position')}: {tables}"), "dim")
        case "resync":
            told = f"resync {message.get('table')} at {message.get('position')}: {message.get('reason')}"
            return Text(printable(told), "dim")
        case "ping" | "pong":
            return None
    return Text(printable(_clipped(raw.decode(errors="replace"))), "dim")


def _change(operation: str, message: Message) -> Iterator[tuple[str, str]]:
    yield f"{printable(str(message.get('commit_timestamp'))[11:])} ", "dim"
    yield f"{operation} ", f"bold {_COLOURS[operation]}"
    yield printable(f"{message.get('schema')}.{message.get('table')}"), _COLOURS[operation]
    old, new = (_row(message.get(name)) for name in ("old_record", "record"))
    for name, value in (old if operation == "DELETE" else new).items():
        changed = operation == "UPDATE" and old.get(name, value) != value
        yield f" {printable(name)}=", "dim"
        yield (f"{_value(old[name])} → " if changed else "") + _value(value), "bold" if changed else ""
    if message.get("left"):
        yield " has left what this user sees", "dim"
    if message.get("repaired"):
        yield " was read back after a gap", "dim"


def _row(value: object) -> Message:
    return value if isinstance(value, dict) else {}


def _value(value: object) -> str:
    """A column's value as JSON, shortened."""
    try:
        text = str(value) if isinstance(value, Decimal) else json.dumps(value, ensure_ascii=False, default=float)
    except RecursionError:
        return "…"
    return printable(_clipped(text))


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def printable(text: str) -> str:
    """The text with every character escaped that has no shape of its own: controls, escapes, changes of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
