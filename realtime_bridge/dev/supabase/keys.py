"""The keys of the stand-in: its own two, users' tokens, and the public keys that it publishes.

Layer: whole (dev). May import: errors, wire.phoenix.
Sources: Supabase Auth (`GET /user`, `GET /.well-known/jwks.json`).
"""

import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import jwt
from websockets.datastructures import Headers

from realtime_bridge.errors import UnauthorizedError
from realtime_bridge.wire.phoenix import Payload


class Keys:
    """Who may do what.

    Args:
        jwt_secret: HS256 secret of users' tokens.
        service_key: may subscribe and read; opaque.
        anon_key: may connect, and no more.

    Attributes:
        jwks: the public keys, as `jwks.json` has them; they are shown, and verify nothing here.
    """

    def __init__(self, jwt_secret: str, service_key: str, anon_key: str, jwks: Sequence[Mapping[str, Any]]) -> None:
        self.jwks = tuple(jwks)
        self._jwt_secret = jwt_secret
        self._service_key = service_key
        self._anon_key = anon_key

    def is_service(self, key: str) -> bool:
        """Whether this key may see everything."""
        return hmac.compare_digest(key.encode(), self._service_key.encode())

    def require_any(self, key: str) -> None:
        """Let a connection pass: by one of the two keys, or by a user's token.

        Raises:
            UnauthorizedError: it is none of them.
        """
        if not self.is_service(key) and not hmac.compare_digest(key.encode(), self._anon_key.encode()):
            self._claims(key)

    def require_service(self, headers: Headers) -> None:
        """Let a request pass that carries the service key.

        Raises:
            UnauthorizedError: it does not.
        """
        if not self.is_service(_bearer(headers) or headers.get("apikey", "")):
            raise UnauthorizedError("only the service key may read here")

    def user(self, headers: Headers) -> Payload:
        """The user whose token a request carries.

        Raises:
            UnauthorizedError: the token does not hold, or is nobody's.
        """
        claims = self._claims(_bearer(headers))
        if not claims.get("sub"):
            raise UnauthorizedError("missing sub claim")
        named = {name: claims.get(name) for name in ("aud", "role", "email", "phone")}
        metadata = {name: claims.get(name, {}) for name in ("app_metadata", "user_metadata")}
        return {"id": claims["sub"], **named, **metadata, "created_at": "2026-01-01T00:00:00Z", "identities": []}

    def _claims(self, token: str) -> dict[str, Any]:
        options: Any = {"require": ["exp", "role"], "verify_aud": False}
        try:
            return dict(jwt.decode(token, self._jwt_secret, algorithms=["HS256"], options=options))
        except jwt.PyJWTError as error:
            raise UnauthorizedError(str(error)) from None


def _bearer(headers: Headers) -> str:
    return headers.get("Authorization", "").removeprefix("Bearer ")
