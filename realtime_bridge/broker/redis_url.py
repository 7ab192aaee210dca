"""The forms of `REDIS_URL`, parsed strictly: what is not understood is refused, never ignored.

    redis://[user:password@]host[:port][/database]          rediss:// is the same over TLS
    unix://[user:password@]/path/to/socket[?db=database]
    redis+sentinel://[user:password@]host[:port],host[:port]…/service[/database]
    redis+cluster://[user:password@]host[:port],host[:port]…

`rediss+sentinel://` and `rediss+cluster://` speak TLS. With TLS, `?ssl_cert_reqs=`, `ssl_ca_certs=`, `ssl_certfile=`,
`ssl_keyfile=` and `ssl_check_hostname=` mean what they mean to redis-py, which has no parser for the last two forms.

Layer: adapters (pure). May import: errors.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NoReturn, TypeAlias
from urllib.parse import parse_qsl, unquote

from realtime_bridge.errors import ConfigurationError

Kind: TypeAlias = Literal["single", "unix", "sentinel", "cluster"]

_URL: Final = re.compile(r"(?P<scheme>[a-z+]+)://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?")
_SCHEMES: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?")
_DATABASE: Final = re.compile(r"[0-9]{1,5}")
_TLS_OPTIONS: Final = {
    "ssl_cert_reqs": re.compile("none|optional|required"),
    "ssl_check_hostname": re.compile("true|false"),
    "ssl_ca_certs": re.compile(".+"),
    "ssl_certfile": re.compile(".+"),
    "ssl_keyfile": re.compile(".+"),
}
_ANY: Final = re.compile(".+")


@dataclass(frozen=True)
class RedisUrl:
    """Where Redis is, and how to speak to it.

    Attributes:
        hosts: host and port; of the Sentinels for `sentinel`, of some nodes for `cluster`; empty for `unix`.
        path: the socket's path for `unix`.
        service: the name of the primary for `sentinel`.
        username: of Redis itself; Sentinels have their own.
        tls_options: keyword arguments of redis-py.
    """

    kind: Kind
    tls: bool = False
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    database: int = 0
    service: str = ""
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    tls_options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """For people: the address, without any secret."""
        hosts = self.path or ", ".join(f"{host}:{port}" for host, port in self.hosts)
        return f"{self.service} of {hosts}" if self.service else hosts


def parse_redis_url(text: str) -> RedisUrl:
    """Read a `REDIS_URL`.

    Raises:
        ConfigurationError: it is of none of the forms; the message says why and holds no secret.
    """
    match = _URL.fullmatch(text)
    if match is None:
        _refuse("expected something like redis://host:6379/0")
    if match["scheme"] not in _SCHEMES:
        _refuse(f"the scheme must be one of {', '.join(_SCHEMES)}")
    kind, tls = _SCHEMES[match["scheme"]]
    userinfo, _, authority = match["authority"].rpartition("@")
    username, password = _parse_userinfo(userinfo)
    options = _parse_query(match["query"] or "", kind, tls=tls)
    path, service, database = _parse_path(match["path"] or "", kind, options.pop("db", None))
    return RedisUrl(
        kind=kind,
        tls=tls,
        hosts=_parse_hosts(authority, kind),
        path=path,
        database=database,
        service=service,
        username=username,
        password=password,
        sentinel_username=options.pop("sentinel_username", None),
        sentinel_password=options.pop("sentinel_password", None),
        tls_options={name: _tls_value(name, value) for name, value in options.items()},
    )


def _refuse(reason: str) -> NoReturn:
    raise ConfigurationError(f"REDIS_URL: {reason}") from None


def _parse_userinfo(userinfo: str) -> tuple[str | None, str | None]:
    if not userinfo:
        return None, None
    username, colon, password = userinfo.partition(":")
    if not colon or not password:
        _refuse("a user name needs a password (user:password@, or :password@ for the default user)")
    return unquote(username) or None, unquote(password)


def _parse_hosts(authority: str, kind: Kind) -> tuple[tuple[str, int], ...]:
    if kind == "unix":
        if authority:
            _refuse("the path of a unix:// socket must be absolute (unix:///path/to/socket)")
        return ()
    default = 26379 if kind == "sentinel" else 6379
    hosts = []
    for part in authority.split(","):
        match = _HOST.fullmatch(part)
        if match is None:
            _refuse("a host is not understood (is a special character of the password not percent-encoded?)")
        port = int(match[3] or default)
        if not 0 < port < 65536:
            _refuse("a port must be between 1 and 65535")
        hosts.append((match[1] or match[2], port))
    if kind == "single" and len(hosts) > 1:
        _refuse("several hosts need redis+sentinel:// or redis+cluster://")
    return tuple(hosts)


def _parse_path(path: str, kind: Kind, db: str | None) -> tuple[str, str, int]:
    """Return socket path, service and database."""
    if kind == "unix":
        if len(path) < 2:
            _refuse("unix:// needs the path of a socket (unix:///path/to/socket)")
        return unquote(path), "", _parse_database(db or "")
    parts = path.removeprefix("/").split("/")
    service = ""
    if kind == "sentinel":
        service = unquote(parts.pop(0))
        if not service:
            _refuse("redis+sentinel:// needs the name of the service (redis+sentinel://host:26379/service)")
    database = _parse_database("/".join(parts))
    if kind == "cluster" and database:
        _refuse("a cluster has database 0 only")
    return "", service, database


def _parse_database(text: str) -> int:
    if text and not _DATABASE.fullmatch(text):
        _refuse("the database must be a number")
    return int(text or 0)


def _parse_query(query: str, kind: Kind, *, tls: bool) -> dict[str, str]:
    allowed = dict(_TLS_OPTIONS) if tls else {}
    if kind == "unix":
        allowed["db"] = _DATABASE
    if kind == "sentinel":
        allowed |= {"sentinel_username": _ANY, "sentinel_password": _ANY}
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in allowed or name in options:
            _refuse(f"query parameters here can be {', '.join(allowed)}, each once" if allowed else "no query expected")
        if not allowed[name].fullmatch(value):
            _refuse(f"the value of {name} is not understood")
        options[name] = value
    return options


def _tls_value(name: str, value: str) -> str | bool:
    return value == "true" if name == "ssl_check_hostname" else value
