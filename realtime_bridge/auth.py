"""Tokens: who may speak to the bridge, and as whom.

The algorithm in a token's header decides which kind of key may verify it, never the other way round: HS256 the shared
secret alone, the others a public key of exactly their kind. Nothing that an unverified token says is believed or
repeated, save its algorithm and key id, which only choose among keys that are ours. Where the secret is known to the
issuer alone, the issuer is asked.

Layer: adapters. May import: errors, claims.
Sources: RFC 7519 section 4.1 (claims), RFC 8725 sections 2.1 and 3.1 (algorithm confusion), contract.md section 2.
"""

import hashlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final, Protocol, TypeAlias

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from fastapi import Request
from jwt.algorithms import HMACAlgorithm

from realtime_bridge.claims import Claims
from realtime_bridge.errors import ConfigurationError, ForbiddenError, UnauthorizedError

PublicKey: TypeAlias = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

_PUBLIC_KEYS: Final[dict[str, type[PublicKey]]] = {
    "RS256": RSAPublicKey,
    "ES256": EllipticCurvePublicKey,
    "EdDSA": Ed25519PublicKey,
}
_ANONYMOUS_ROLE: Final = "anon"
_ANON_KEY_ISSUERS: Final = ("supabase", "supabase-demo")
"""The `iss` of a project's legacy anon key, and of one that Supabase's command line runs."""
_API_KEYS: Final = ("sb_publishable_", "sb_secret_")
"""How Supabase's opaque keys begin: they name an application, never a user."""
_LARGEST_TOKEN: Final = 16 * 1024
_LATEST_TIME: Final = 253_402_300_800
"""The year 10000: what lies beyond is a mistake (milliseconds, mostly) and fits no calendar."""
_STRONG_SECRET: Final = 32
"""Bytes that RFC 7518 section 3.2 asks of an HS256 key."""
_ESCAPED_NUL: Final = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


class KeySet(Protocol):
    """The public keys of whoever issues tokens."""

    async def key(self, kid: str | None, algorithm: str) -> PublicKey:
        """The key of that id, or, without an id, the only one that fits the algorithm.

        Raises:
            UnauthorizedError: there is no such key.
            UnavailableError: the keys cannot be had now; the token may be good.
        """
        ...


Confirm: TypeAlias = Callable[[str, Claims], Awaitable[None]]
"""Asks the issuer whether a token holds, whose claims hold if it does. Raises `UnauthorizedError` if not, and
`UnavailableError` if the issuer does not say."""


class Verifier:
    """Turns a token into claims, or refuses it.

    Args:
        secret: the HS256 secret; without it, and without `confirm`, HS256 is refused.
        keys: where RS256, ES256 and EdDSA keys come from; without it they are refused.
        confirm: stands in for a secret that is not known: an HS256 token holds if its issuer says so.
        audience: what `aud` must be or contain.
        issuer: what `iss` must be, if anything; a legacy anon key has one of Supabase's own.
        roles: the Postgres roles that may connect.
        configured_keys: keys that the operator has set. One that is a JWT is known by its text and holds without
            signature, `exp`, `aud`, `iss` and `sub`; one that is none (`sb_secret_…`) is no token and ignored.
        leeway: seconds by which the clock of the issuer may be ahead (`nbf`, `iat`). `exp` has none, since a
            connection made after it would be closed at once.

    Raises:
        ConfigurationError: the secret is a public key or a certificate.
    """

    def __init__(
        self,
        *,
        secret: str | None,
        keys: KeySet | None = None,
        confirm: Confirm | None = None,
        audience: str = "authenticated",
        issuer: str | None = None,
        roles: Collection[str] = ("anon", "authenticated"),
        configured_keys: Collection[str] = (),
        leeway: float = 10.0,
    ) -> None:
        self._secret = _examined(secret) if secret else None
        self._keys = keys
        self._confirm = confirm
        self._audience = audience
        self._issuer = issuer
        self._roles = frozenset(roles)
        self._configured = _readable(configured_keys)
        self._leeway = leeway
        self._signatures = _signatures()

    @property
    def weak_secret(self) -> bool:
        """Whether there is a secret and it is shorter than an HS256 key should be: worth one warning at the start."""
        return self._secret is not None and len(self._secret) < _STRONG_SECRET

    async def verify(self, token: str) -> Claims:
        """The claims of a token that holds now.

        Raises:
            UnauthorizedError: it does not hold; the reason never quotes it.
            ForbiddenError: it holds, but names no role or one that may not connect.
            UnavailableError: raised by the `KeySet` or by `confirm`, when they cannot tell.
        """
        if len(token) > _LARGEST_TOKEN:
            raise UnauthorizedError("too long")
        if not token.isascii():
            raise UnauthorizedError("malformed")
        if token.startswith(_API_KEYS):
            raise UnauthorizedError("this is an API key: send the access token of a user who has signed in")
        configured = self._configured_key(token)
        if configured is not None:
            return self._claims(configured, trusted=True)
        with _refusals():
            header = self._signatures.get_unverified_header(token)
        algorithm = header.get("alg")
        if algorithm == "HS256" and self._secret is None and self._confirm is not None:
            claims = self._claims(_unverified(token), trusted=False)
            await self._confirm(token, claims)
            return claims
        key = await self._key(algorithm, header.get("kid"))
        with _refusals():
            signed = self._signatures.decode_complete(token, key, algorithms=[str(algorithm)])
        return self._claims(_object(signed["payload"]), trusted=False)

    def _configured_key(self, token: str) -> Mapping[str, Any] | None:
        """The claims of the configured key that the token is. Compares with all of them, in constant time."""
        found = None
        for key, values in self._configured.items():
            if hmac.compare_digest(key, token.encode()):
                found = values
        return found

    async def _key(self, algorithm: object, kid: str | None) -> bytes | PublicKey:
        """The one kind of key that may verify this algorithm."""
        if algorithm == "HS256" and self._secret is not None:
            return self._secret
        if isinstance(algorithm, str) and algorithm in _PUBLIC_KEYS and self._keys is not None:
            key = await self._keys.key(kid, algorithm)
            if not _fits(key, algorithm):
                raise UnauthorizedError("the key does not fit the algorithm")
            return key
        raise UnauthorizedError(f"algorithm {_printable(algorithm)} not accepted")

    def _claims(self, values: Mapping[str, Any], trusted: bool) -> Claims:
        """Check what the claims say; `trusted` are a configured key's."""
        expires_at = self._check_times(values, trusted)
        role = values.get("role")
        if not isinstance(role, str) or not role:
            raise ForbiddenError("the token names no role")
        if role not in self._roles:
            raise ForbiddenError("the token's role may not connect: it is not one of BRIDGE_ROLES")
        personal = not trusted and role != _ANONYMOUS_ROLE
        if not trusted:
            self._check_issuer(values, role)
        if personal:
            self._check_audience(values)
        claims = Claims(values, role, _subject(values, required=personal), expires_at)
        _check_text(claims)
        return claims

    def _check_times(self, values: Mapping[str, Any], trusted: bool) -> float | None:
        """When the token ends; it has begun and not ended."""
        now = time.time()
        expires_at = _time(values, "exp")
        if expires_at is None and not trusted:
            raise UnauthorizedError("exp is missing")
        if expires_at is not None and expires_at <= now:
            raise UnauthorizedError("expired")
        for name in ("nbf", "iat"):
            begins_at = _time(values, name)
            if begins_at is not None and begins_at > now + self._leeway:
                raise UnauthorizedError(f"not valid yet ({name})")
        return expires_at

    def _check_issuer(self, values: Mapping[str, Any], role: str) -> None:
        """The token was made by whom we expect; or it is a key of role `anon`, as Supabase made them before."""
        issuer = values.get("iss")
        if self._issuer is None or issuer == self._issuer:
            return
        if role != _ANONYMOUS_ROLE or issuer not in _ANON_KEY_ISSUERS:
            raise UnauthorizedError("wrong issuer")

    def _check_audience(self, values: Mapping[str, Any]) -> None:
        """The token was made for us."""
        audience = values.get("aud")
        if audience is None:
            raise UnauthorizedError("aud is missing")
        if self._audience not in (audience if isinstance(audience, list) else [audience]):
            raise UnauthorizedError("wrong audience")


def bearer(authorization: str | None) -> str | None:
    """The token in an `Authorization` header's value; None if there is none, or one of another scheme."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def require_claims(verifier: Verifier, *, token_in_query: bool = False) -> Callable[[Request], Awaitable[Claims]]:
    """A FastAPI dependency that gives the caller's claims; `token_in_query` accepts `?token=` too.

    It raises what `Verifier.verify` does, and `UnauthorizedError` where there is no token.
    """

    async def claims(request: Request) -> Claims:
        token = bearer(request.headers.get("authorization"))
        if token is None and token_in_query:
            token = request.query_params.get("token")
        if not token:
            raise UnauthorizedError("missing")
        return await verifier.verify(token)

    return claims


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what PyJWT raises into a reason that quotes nothing."""
    try:
        yield
    except jwt.InvalidSignatureError:
        raise UnauthorizedError("signature") from None
    except jwt.InvalidKeyError:
        raise UnauthorizedError("the key does not fit the algorithm") from None
    except jwt.PyJWTError:
        raise UnauthorizedError("malformed") from None


class _SharedSecret(HMACAlgorithm):
    """HS256 with a secret that was examined once, at the start, instead of with every token."""

    def prepare_key(self, key: str | bytes) -> bytes:
        assert isinstance(key, bytes)
        return key

    def check_key_length(self, key: bytes) -> str | None:
        return None  # told once, by `weak_secret`


def _signatures() -> jwt.PyJWS:
    """A verifier of signatures that knows four algorithms and takes no weak public key."""
    signatures = jwt.PyJWS(algorithms=list(_PUBLIC_KEYS), options={"enforce_minimum_key_length": True})
    signatures.register_algorithm("HS256", _SharedSecret(hashlib.sha256))
    return signatures


def _examined(secret: str) -> bytes:
    try:
        return HMACAlgorithm(hashlib.sha256).prepare_key(secret)
    except jwt.InvalidKeyError:
        raise ConfigurationError("SUPABASE_JWT_SECRET is a public key or certificate, not a shared secret.") from None


def _unverified(token: str) -> Mapping[str, Any]:
    """What a token says, whoever signed it.

    Raises:
        UnauthorizedError: it is no JWT.
    """
    with _refusals():
        return _object(jwt.PyJWS().decode_complete(token, options={"verify_signature": False})["payload"])


def _readable(configured_keys: Collection[str]) -> dict[bytes, Mapping[str, Any]]:
    """The claims of those configured keys that are JWTs."""
    claims = {}
    for key in configured_keys:
        with suppress(UnauthorizedError, UnicodeEncodeError):
            claims[key.encode()] = _unverified(key)
    return claims


def _object(payload: bytes) -> Mapping[str, Any]:
    try:
        values = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise UnauthorizedError("malformed") from None
    if not isinstance(values, dict):
        raise UnauthorizedError("malformed")
    return values


def _fits(key: object, algorithm: str) -> bool:
    """Whether a key is of the kind that the algorithm asks for; text or bytes never are."""
    if not isinstance(key, _PUBLIC_KEYS[algorithm]):
        return False
    return not isinstance(key, EllipticCurvePublicKey) or isinstance(key.curve, SECP256R1)


def _time(values: Mapping[str, Any], name: str) -> float | None:
    """A claim that is seconds since 1970."""
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LATEST_TIME:
        raise UnauthorizedError(f"{name} is not a time in seconds")
    return float(value)


def _subject(values: Mapping[str, Any], *, required: bool) -> str | None:
    subject = values.get("sub")
    if subject is None and not required:
        return None
    if not isinstance(subject, str) or not subject:
        raise UnauthorizedError("sub is missing" if subject is None else "sub is not a text")
    return subject


def _check_text(claims: Claims) -> None:
    """The claims can be handed to Postgres: not nested beyond reason, and without the character that it has not."""
    try:
        encoded = claims.encoded
    except orjson.JSONEncodeError:
        raise UnauthorizedError("nested too deep") from None
    if _ESCAPED_NUL.search(encoded):
        raise UnauthorizedError("a claim holds the character NUL")


def _printable(algorithm: object) -> str:
    """An algorithm's name, if it looks like one: a refusal may be logged."""
    known = isinstance(algorithm, str) and algorithm.isascii() and algorithm.isalnum() and len(algorithm) <= 10
    return str(algorithm) if known else "unknown"
