"""Everything this package raises on purpose.

    BridgeError
    ├── ConfigurationError        the operator must change a setting (exit status 2)
    ├── BadRequestError           400  a message or parameter was not understood
    │   └── InvalidPositionError
    ├── UnauthorizedError         401  no token, or a token that does not hold
    ├── ForbiddenError            403  a role, origin or table that may not be used
    ├── NotFoundError             404
    ├── ClientTimeoutError        408  the client did not answer in time
    ├── MessageTooLargeError      413
    ├── TooManyRequestsError      429
    ├── UnavailableError          503  something the bridge needs cannot be reached now
    │   ├── BrokerError
    │   ├── SourceError
    │   └── DatabaseError
    ├── HistoryGoneError          the position is older than the history, or of another one
    ├── LeaseLostError            another process leads
    └── ForkError                 the history lost entries that this process has seen

Layer: words. Edges map errors by class attribute, never by message.
"""

from typing import ClassVar


class BridgeError(Exception):
    """Base class of every error this package raises on purpose."""

    status_code: ClassVar[int] = 500

    @property
    def close_code(self) -> int:
        """The WebSocket close code: 4000 + the HTTP status that says the same; 1013 for overload."""
        return 1013 if self.status_code == 503 else 4000 + self.status_code

    @property
    def detail(self) -> str:
        """What a client may be told."""
        return str(self)


class ConfigurationError(BridgeError):
    """A setting is missing or wrong; the message is one sentence that names the variable."""


class BadRequestError(BridgeError):
    """A message or a parameter was not understood."""

    status_code = 400


class InvalidPositionError(BadRequestError):
    """The text is not a position that this bridge has given out."""

    def __init__(self, text: str) -> None:
        super().__init__("position: not a position of this bridge")
        self.text = text


class UnauthorizedError(BridgeError):
    """The token is missing, invalid, expired or revoked."""

    status_code = 401

    def __init__(self, reason: str) -> None:
        super().__init__(f"token refused: {reason}")
        self.reason = reason


class ForbiddenError(BridgeError):
    """The role, the origin or the table may not be used."""

    status_code = 403


class NotFoundError(BridgeError):
    """There is no such thing, or the caller may not see it."""

    status_code = 404


class ClientTimeoutError(BridgeError):
    """The client said nothing for too long."""

    status_code = 408


class MessageTooLargeError(BridgeError):
    """A message from the client is over the limit."""

    status_code = 413


class TooManyRequestsError(BridgeError):
    """Too many connections, subscriptions or messages."""

    status_code = 429


class UnavailableError(BridgeError):
    """Something the bridge needs cannot be reached now; trying again later is right."""

    status_code = 503


class BrokerError(UnavailableError):
    """The broker cannot be reached or refuses to work."""


class SourceError(UnavailableError):
    """The source of changes cannot be read."""


class DatabaseError(UnavailableError):
    """Postgres cannot be reached or refuses to work."""


class HistoryGoneError(BridgeError):
    """The history no longer holds, or never held, what follows the position."""


class LeaseLostError(BridgeError):
    """Another process holds the lease; whatever this one still wants to append is refused."""


class ForkError(BridgeError):
    """The broker's history is not the continuation of what this process has seen.

    Attributes:
        number: the last number that both have in common.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"the history was cut back to {number}")
        self.number = number
