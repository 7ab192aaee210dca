"""What `realtime-bridge dev` does: start the parts in order, say how to use them, end when told to or when one dies.

Nothing is left behind, however it ends: what could outlive this process lives in a `GuardedFolder`.

Layer: whole (dev). May import: everything.
"""

import asyncio
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import orjson
from rich.console import Console

from realtime_bridge.database import Database
from realtime_bridge.dev.bridges import DRAIN_SECONDS, BridgeChild, listen
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.processes import EmbeddedServer, ServerDiedError
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.dev.users import api_key, sample_users
from realtime_bridge.dev.writer import Writer
from realtime_bridge.settings import Settings
from realtime_bridge.sources.postgres import ensure_publication

TABLES: Final = ("public.posts",)

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WATCH_SECONDS: Final = 0.2
_EXPLANATION_SECONDS: Final = 1.0
_KEPT_VARIABLES: Final = frozenset({"PATH", "HOME", "TMPDIR", "TERM", "LANG", "LD_LIBRARY_PATH", "PG_BIN", "NO_COLOR"})
_KEPT_PREFIXES: Final = ("LC_", "PYTHON", "COVERAGE")
_POSTGRES_OPTIONS: Final = {"log_min_messages": "fatal"}  # what a polled slot logs would fill the disk

Server = TypeVar("Server", bound=EmbeddedServer)


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    port: int
    source: Literal["postgres", "supabase"]
    redis: bool
    writer: bool
    users: int
    print_env: bool


def run(options: Options) -> None:
    """Run everything until a signal; a second one hurries.

    Raises:
        ConfigurationError: an engine is not installed.
        UnavailableError: a part did not start, or has died.
    """
    _forget_environment()
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)  # of a dead Postgres we tell ourselves
    asyncio.run(_Demo(options).run())


def _forget_environment() -> None:
    """Drop what was set for other purposes: settings of a real bridge, how to reach other databases, proxies."""
    for name in set(os.environ) - _KEPT_VARIABLES:
        if not name.startswith(_KEPT_PREFIXES):
            del os.environ[name]


class Narrator:
    """Tells what happens: on standard output, or on standard error where that is kept for the JSON line."""

    def __init__(self, *, on_error_output: bool) -> None:
        self._console = Console(stderr=on_error_output, highlight=False, soft_wrap=True)
        self._mark = "ok" if self._console.options.ascii_only else "✓"

    @property
    def is_watched(self) -> bool:
        """Whether a person is there."""
        return self._console.is_terminal

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Say it when it is done, with the time it took; on a terminal also while it goes on."""
        started = time.monotonic()
        with self._console.status(f"{title} …"):
            yield
        self.say(f"[green]{self._mark}[/] {title} [dim]({time.monotonic() - started:.1f} s)[/]")

    def say(self, text: str = "") -> None:
        """Say a line, in rich's markup."""
        with suppress(OSError):  # the terminal may be gone
            self._console.print(text)


@dataclass(frozen=True)
class _Part:
    """A process that must not end by itself."""

    name: str
    has_ended: Callable[[], bool]
    log: Callable[[], str]

    def death_notice(self) -> str:
        return f"{self.name} has ended: {' | '.join(self.log().splitlines()[-3:]) or 'it said nothing'}"


class _Demo:
    """One run: its parts, and what they have to know of each other."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._narrator = Narrator(on_error_output=options.print_env)
        self._secret = secrets.token_urlsafe(32)
        self._service_key = api_key(self._secret, "service_role")
        self._anon_key = api_key(self._secret, "anon")
        self._users = sample_users(options.users)
        self._settings = {
            "SUPABASE_JWT_SECRET": self._secret,
            "BRIDGE_DRAIN_SECONDS": str(DRAIN_SECONDS),
            "BRIDGE_PING_SECONDS": "5",  # what the page shows of `complete_until` then moves while one looks
        }
        self._parts: list[_Part] = []
        self._bridges: list[BridgeChild] = []
        self._writer: Writer | None = None
        self._death = ""
        self._stopping = False

    async def run(self) -> None:
        """Start everything and keep it going until a signal or the death of a part."""
        self._heed_signals()
        try:
            async with AsyncExitStack() as stack:
                try:
                    await self._start_and_watch(stack)
                except BaseException:
                    self._death = await self._explanation()
                    raise
        except BaseException as error:
            if self._death:
                raise ServerDiedError(self._death) from error
            if not (self._stopping and isinstance(error, asyncio.CancelledError)):
                raise

    def _heed_signals(self) -> None:
        """Let a signal cancel what is going on; a second one, the waiting while all is ended."""
        task = asyncio.current_task()
        assert task is not None, "run is a coroutine"

        def stop() -> None:
            if not self._stopping:
                hint = " (again to hurry)" if self._narrator.is_watched else ""
                self._narrator.say(f"\nStopping{hint} …")
            self._stopping = True
            task.cancel()

        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, stop)

    async def _explanation(self) -> str:
        """Which part has died, if something went wrong because of that: it may take a moment to show."""
        with suppress(TimeoutError):
            async with asyncio.timeout(0 if self._stopping else _EXPLANATION_SECONDS):
                return (await self._first_death()).death_notice()
        return ""

    async def _start_and_watch(self, stack: AsyncExitStack) -> None:
        started = time.monotonic()
        await self._start(stack)
        self._tell(time.monotonic() - started)
        async with asyncio.TaskGroup() as tasks:
            writing = None if self._writer is None else tasks.create_task(self._writer.run(), name="writer")
            dead = await self._first_death()
            if writing is not None:
                writing.cancel()
        raise ServerDiedError(dead.death_notice())

    async def _first_death(self) -> _Part:
        while True:
            for part in self._parts:
                if part.has_ended():
                    return part
            await asyncio.sleep(_WATCH_SECONDS)

    # -- starting ------------------------------------------------------------------------------------------------------

    async def _start(self, stack: AsyncExitStack) -> None:
        wanted = [self._options.port, 0] if self._options.redis else [self._options.port]
        listeners = [stack.enter_context(listen(port)) for port in wanted]  # first, as it fails at once
        await self._start_engines(stack)
        if self._options.source == "supabase":
            await self._start_supabase(stack)
        self._bridges = [BridgeChild(one, self._settings, users=len(self._users)) for one in listeners]
        await self._start_bridges(stack)
        if self._options.writer:
            database = await stack.enter_async_context(Database(self._settings["DATABASE_URL"]))
            self._writer = Writer(database, self._users)
            await self._writer.begin()

    async def _start_engines(self, stack: AsyncExitStack) -> None:
        with self._narrator.step("Postgres with the sample table"):
            postgres = await self._enter(stack, EmbeddedPostgres(options=_POSTGRES_OPTIONS))
            self._settings["DATABASE_URL"] = postgres.dsn()
            await install_schema(postgres.dsn())
            await ensure_publication(postgres.dsn(), Settings.model_fields["publication"].default, TABLES)
        if self._options.redis:
            with self._narrator.step("Valkey"):
                valkey = await self._enter(stack, EmbeddedValkey())
            self._settings["REDIS_URL"] = valkey.url

    async def _enter(self, stack: AsyncExitStack, server: Server) -> Server:
        """Start an engine in a thread, to the end even when cancelled: one half started could not be stopped."""
        entering = asyncio.get_running_loop().run_in_executor(None, stack.enter_context, server)
        try:
            await asyncio.shield(entering)
        except asyncio.CancelledError:
            await asyncio.wait([entering])
            raise
        process = server._process  # noqa: SLF001
        assert process is not None, "entered"
        self._parts.append(_Part(server.name, lambda: process.poll() is not None, lambda: server.log))
        return server

    async def _start_supabase(self, stack: AsyncExitStack) -> None:
        with self._narrator.step("local Supabase"):
            project = LocalSupabase(
                self._settings["DATABASE_URL"],
                jwt_secret=self._secret,
                service_key=self._service_key,
                anon_key=self._anon_key,
                tables=TABLES,
            )
            await stack.enter_async_context(project)
        self._settings |= {"SUPABASE_URL": project.url, "SUPABASE_KEY": self._service_key}

    async def _start_bridges(self, stack: AsyncExitStack) -> None:
        with self._narrator.step("two bridges" if len(self._bridges) > 1 else "bridge"):
            for bridge in self._bridges:
                await stack.enter_async_context(bridge)
                self._parts.append(_part_of(bridge))
            stack.callback(self._ask_bridges_to_end)
            for bridge in self._bridges:
                await bridge.ready()

    def _ask_bridges_to_end(self) -> None:
        """All at once, so that they end side by side."""
        for bridge in self._bridges:
            bridge.terminate()

    # -- telling -------------------------------------------------------------------------------------------------------

    def _tell(self, seconds: float) -> None:
        if self._options.print_env:
            self._narrator.say(f"Ready in {seconds:.1f} s at {self._urls()}")
            print(orjson.dumps(self._environment()).decode(), flush=True)  # noqa: T201
            return
        say = self._narrator.say
        say(f"\n[bold]Ready in {seconds:.1f} s.[/] The page: [bold]{self._urls()}[/]")
        say(f"Postgres: {self._settings['DATABASE_URL']}")
        if "REDIS_URL" in self._settings:
            say(f"Valkey:   {self._settings['REDIS_URL']}")
        say("\nTokens, good for a day:")
        for user in self._users:
            say(f"{user.name.upper()}={user.token(self._secret)}")
        name = self._users[0].name.upper()
        url = self._bridges[0].url
        say("\nFollow a user in another terminal, once a token is pasted there:")
        say(f'curl -N -H "Accept: text/event-stream" -H "Authorization: Bearer ${name}" {url}/events')
        say(f'{sys.executable} -m websockets "{url.replace("http", "ws", 1)}/ws?token=${name}"')
        say("\nCtrl-C ends everything.")

    def _urls(self) -> str:
        return " and ".join(f"{bridge.url}/" for bridge in self._bridges)

    def _environment(self) -> dict[str, object]:
        """What `--print-env` prints."""
        return {
            "url": self._bridges[0].url,
            "database_url": self._settings["DATABASE_URL"],
            "redis_url": self._settings.get("REDIS_URL"),
            "jwt_secret": self._secret,
            "service_key": self._service_key,
            "anon_key": self._anon_key,
            "users": [user.describe(self._secret) for user in self._users],
        }


def _part_of(bridge: BridgeChild) -> _Part:
    return _Part(bridge.name, lambda: bridge.has_ended, lambda: bridge.log)
