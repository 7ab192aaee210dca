"""How the bridge logs: one line per connection or change of state, JSON off a terminal, nothing secret.

Layer: words.
"""

import logging
import re
import sys
from typing import Any, Final

import orjson

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
_SECRET: Final = re.compile(
    r"(?i)\b(token|ticket|apikey|api_key|password|key)=[^&\s\"']+"  # in a query
    r"|eyJ[\w-]{8,}(?:\.[\w-]*){0,2}"  # a JWT, or what was left of one
    r"|sb_(?:secret|publishable)_\w+"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user and password in an address
)


_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127)}
"""What a client's text could move a terminal with, or begin a line of its own."""


def redact(text: str) -> str:
    """Put `[redacted]` in place of anything that looks like a token, a key or a password."""
    return _SECRET.sub(lambda m: f"{m[1]}=[redacted]" if m[1] else "[redacted]", text)


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


class LineFormatter(logging.Formatter):
    """For people: time, level, logger, message, `name=value` of what came as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        head = f"{self.formatTime(record, '%H:%M:%S')} {record.levelname:<7} {record.name}: {record.getMessage()}"
        parts = [head, *(f"{name}={value}" for name, value in _extra(record).items())]
        text = " ".join(parts).translate(_CONTROLS)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return redact(text)


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: str(value) for name, value in _extra(record).items()},
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return redact(orjson.dumps(fields).decode())


def configure(level: int = logging.INFO) -> None:
    """Send every log line to standard error, redacted: for people on a terminal, else as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter() if sys.stderr.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # asyncpg tells, with a traceback each, of every try to keep its pool filled while the database is away.
    logging.getLogger("asyncpg").setLevel(logging.ERROR)
    # uvicorn tells two lines a WebSocket; one is the most that a connection may cost, and the bridge writes its own.
    for name in ("uvicorn", "httpx", "httpcore", "realtime", "websockets", "hpack", "h2"):
        logging.getLogger(name).setLevel(logging.WARNING)
