"""What `realtime-bridge dev` does: start the parts in order, say how to use them, and end when told to or when one dies.

Layer: whole (dev). May import: everything but the command line's own modules.
"""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import orjson
from rich.console import Console

from realtime_bridge.database import Database
from realtime_bridge.dev.bridges import DRAIN_SECONDS, BridgeChild, death_notice, listen
from realtime_bridge.dev.engines import EmbeddedPostgres, EmbeddedValkey
from realtime_bridge.dev.processes import EmbeddedServer, ServerDiedError
from realtime_bridge.dev.schema import install_schema
from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.dev.users import SampleUser, api_key, sample_users
from realtime_bridge.dev.writer import Writer
from realtime_bridge.settings import Settings
from realtime_bridge.sources.postgres import ensure_publication

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WATCH_SECONDS: Final = 0.2
_KEPT_VARIABLES: Final = frozenset({"PATH", "HOME", "TMPDIR", "TERM", "LANG", "LD_LIBRARY_PATH", "PG_BIN", "NO_COLOR"})
_KEPT_PREFIXES: Final = ("LC_", "PYTHON", "VIRTUAL_ENV", "COVERAGE")

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
    """Run everything until a signal.

    Raises:
        ConfigurationError: an engine is not installed.
        UnavailableError: a part did not start, or has died.
    """
    _forget_environment()
    asyncio.run(_until_signal(_Demo(options).run()))


def _forget_environment() -> None:
    """Drop what is set for other purposes: settings of a real bridge, passwords for Postgres, proxies."""
    for name in set(os.environ) - _KEPT_VARIABLES:
        if not name.startswith(_KEPT_PREFIXES):
            del os.environ[name]


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Do the work until it ends or a signal cancels it. A second signal cancels the clean-up's waiting."""
    task = asyncio.current_task()
    assert task is not None
    signalled = False

    def stop() -> None:
        nonlocal signalled
        signalled = True
        task.cancel()

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await work
    except asyncio.CancelledError:
        if not signalled:
            raise


class _Narrator:
    """Tells what happens: on standard output, or, where that is for the JSON line, on standard error."""

    def __init__(self, *, quiet_output: bool) -> None:
        self.console = Console(stderr=quiet_output, highlight=False, soft_wrap=True)
        self._mark = "ok" if self.console.options.ascii_only else "✓"

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One line when it is done, with its time; meanwhile, on a terminal, that it is going on."""
        started = time.monotonic()
        with self.console.status(title):
            yield
        self.console.print(f"[green]{self._mark}[/] {title} [dim]{time.monotonic() - started:.1f} s[/]")

    def say(self, text: str = "") -> None:
        self.console.print(text)


@dataclass(frozen=True)
class _Part:
    """Something that must not end by itself."""

    name: str
    has_ended: Callable[[], bool]
    log: Callable[[], str]


class _Demo:
    """The parts of one run."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._narrator = _Narrator(quiet_output=options.print_env)
        self._secret = secrets.token_urlsafe(32)
        self._service_key = api_key(self._secret, "service_role")
        self._anon_key = api_key(self._secret, "anon")
        self._users: list[SampleUser] = sample_users(options.users)
        self._parts: list[_Part] = []
        self._settings = {"SUPABASE_JWT_SECRET": self._secret, "BRIDGE_DRAIN_SECONDS": str(DRAIN_SECONDS)}
        self._redis_url: str | None = None

    async def run(self) -> None:
        """Start, tell, and keep going until cancelled or until a part dies."""
        started = time.monotonic()
        try:
            async with AsyncExitStack() as stack:
                await self._start(stack)
                self._tell(time.monotonic() - started)
                await self._watch()
        except Exception:
            self._report_death()  # which explains whatever came of it
            raise

    async def _start(self, stack: AsyncExitStack) -> None:
        listeners = [stack.enter_context(listen(self._options.port))]
        if self._options.redis:
            listeners.append(stack.enter_context(listen(0)))
        await self._start_postgres(stack)
        if self._options.redis:
            with self._narrator.step("Valkey"):
                valkey = await self._enter(stack, EmbeddedValkey())
            self._redis_url = self._settings["REDIS_URL"] = valkey.url
        if self._options.source == "supabase":
            await self._start_supabase(stack)
        self._bridges = [
            BridgeChild(f"the bridge on port {listener.getsockname()[1]}", listener, self._settings, users=len(self._users))
            for listener in listeners
        ]
        await self._start_bridges(stack)
        if self._options.writer:
            await self._start_writer(stack)

    async def _start_postgres(self, stack: AsyncExitStack) -> None:
        with self._narrator.step("Postgres"):
            postgres = await self._enter(stack, EmbeddedPostgres())
        self._database_url = self._settings["DATABASE_URL"] = postgres.dsn()
        with self._narrator.step("sample schema and publication"):
            await install_schema(self._database_url)
            publication = Settings.model_fields["publication"].default
            await ensure_publication(self._database_url, publication, ["public.posts"])

    async def _start_supabase(self, stack: AsyncExitStack) -> None:
        with self._narrator.step("local Supabase Realtime"):
            supabase = await stack.enter_async_context(
                LocalSupabase(
                    self._database_url,
                    jwt_secret=self._secret,
                    service_key=self._service_key,
                    anon_key=self._anon_key,
                )
            )
        self._settings |= {"SUPABASE_URL": supabase.url, "SUPABASE_KEY": self._service_key}

    async def _start_bridges(self, stack: AsyncExitStack) -> None:
        title = "bridge" if len(self._bridges) == 1 else f"{len(self._bridges)} bridges"
        with self._narrator.step(title):
            for bridge in self._bridges:
                await stack.enter_async_context(bridge)
                self._parts.append(_Part(bridge.name, lambda bridge=bridge: bridge.has_ended, lambda bridge=bridge: bridge.log))
            stack.callback(self._say_goodbye)
            for bridge in self._bridges:
                await bridge.ready()
