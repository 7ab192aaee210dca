"""What only the issuer of tokens can tell: its public keys or, where it publishes none, whether a token holds.

Keys are fetched before they are needed, so that verifying a token waits for nobody. A failed fetch is no news: the keys
that are known stay, and a token that none of them fits may yet be good, so it is answered "not now", never "no". A good
fetch is all the news: keys that it does not hold verify nothing any more.

Layer: adapters. May import: errors, claims, auth.
Sources: RFC 7517 (JWK), RFC 7518 section 6, RFC 8037 (Ed25519), `GET /auth/v1/user` of Supabase Auth.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self, TypeAlias
from urllib.parse import urlsplit

import httpx
import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from realtime_bridge.auth import PublicKey
from realtime_bridge.claims import Claims
from realtime_bridge.errors import ConfigurationError, UnauthorizedError, UnavailableError

logger = logging.getLogger(__name__)

REFRESH_SECONDS: Final = 300.0
"""A key that the issuer has withdrawn verifies nothing after so long."""
UNKNOWN_SECONDS: Final = 30.0
"""Tokens of unknown keys, however many, cause one fetch in so long."""
FETCH_SECONDS: Final = 5.0
MOST_KEYS: Final = 32
_FIRST_BACKOFF_SECONDS: Final = 1.0
_LONGEST_BACKOFF_SECONDS: Final = 30.0
_LARGEST_ANSWER: Final = 256 * 1024
_RSA_BITS: Final = range(2048, 8192 + 1)
_LONGEST_KID: Final = 256

CONFIRMED_SECONDS: Final = 60.0
"""A session that Supabase Auth has ended is refused after so long."""
_MOST_CONFIRMED: Final = 10_000
_MOST_QUESTIONS: Final = 16

# -- keys --------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A public key and what it may verify."""

    kid: str | None
    algorithm: str
    public: PublicKey


_KINDS: Final[Mapping[tuple[object, object], tuple[str, Callable[[dict[str, Any]], Any]]]] = {
    ("RSA", None): ("RS256", RSAAlgorithm.from_jwk),
    ("EC", "P-256"): ("ES256", ECAlgorithm.from_jwk),
    ("OKP", "Ed25519"): ("EdDSA", OKPAlgorithm.from_jwk),
}


def parse_jwks(document: bytes) -> tuple[list[Key], list[str]]:
    """The usable keys of a JWKS document, and why each of the others is not.

    Raises:
        ValueError: it is no JWKS document.
    """
    content = orjson.loads(document)
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError("no JWKS document")
    keys: list[Key] = []
    ignored = ["more keys than are looked at"] if len(entries) > MOST_KEYS else []
    for entry in entries[:MOST_KEYS]:
        try:
            key = parse_jwk(entry)
            if key.kid is not None and any(key[:2] == other[:2] for other in keys):
                raise ValueError("kid is not unique")
            keys.append(key)
        except ValueError as error:
            ignored.append(str(error))
    return keys, ignored


def parse_jwk(entry: object) -> Key:
    """One public key that may verify tokens.

    Raises:
        ValueError: it is none; the reason quotes nothing of it.
    """
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    if "d" in entry:
        raise ValueError("a private key")
    kind, curve, kid = entry.get("kty"), entry.get("crv"), entry.get("kid")
    if not isinstance(kind, str) or not isinstance(curve, str | None) or (kind, curve) not in _KINDS:
        raise ValueError("kty or crv is not accepted")
    algorithm, load = _KINDS[kind, curve]
    if entry.get("alg", algorithm) != algorithm:
        raise ValueError("alg is not accepted")
    if entry.get("use", "sig") != "sig" or "verify" not in _listed(entry.get("key_ops", ["verify"])):
        raise ValueError("not for signatures")
    if not isinstance(kid, str | None) or len(kid or "") > _LONGEST_KID:
        raise ValueError("kid is not a short text")
    try:
        public = load(entry)
    except (TypeError, ValueError, AttributeError, jwt.InvalidKeyError):
        raise ValueError("malformed") from None
    if isinstance(public, RSAPublicKey) and public.key_size not in _RSA_BITS:
        raise ValueError("an RSA key of a size that is not accepted")
    return Key(kid, algorithm, public)


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def choose(keys: Sequence[Key], kid: str | None, algorithm: str) -> PublicKey | None:
    """The key of that id and algorithm. Where the token or the key has no id, the only one of that algorithm."""
    fitting = [key for key in keys if key.algorithm == algorithm]
    for key in fitting:
        if kid is not None and key.kid == kid:
            return key.public
    if len(fitting) == 1 and (kid is None or fitting[0].kid is None):
        return fitting[0].public
    return None


class JwksKeySet:
    """The public keys that an issuer publishes at an address: an `auth.KeySet`.

    Enter it before anything verifies, and have `run` run while it is open. It belongs to one event loop.

    Args:
        url: of the JWKS document.
        timeout: seconds for one fetch, from connecting to the last byte.
        refresh_seconds: between two fetches that nobody asked for.
        clock: seconds that only ever grow.

    Attributes:
        fetches: begun so far.
        failures: those that brought no keys.

    Raises:
        ConfigurationError: the address is none of HTTP.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = FETCH_SECONDS,
        refresh_seconds: float = REFRESH_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.fetches = 0
        self.failures = 0
        self._url = _http_address(url, "SUPABASE_JWKS_URL")
        self._timeout = timeout
        self._refresh_seconds = refresh_seconds
        self._clock = clock
        self._client: httpx.AsyncClient | None = None
        self._keys: Sequence[Key] = ()
        self._fetching = asyncio.Lock()
        self._failures_in_a_row = 0
        self._may_ask_at = clock()
        self._teller = _Teller()

    async def __aenter__(self) -> Self:
        self._client = _make_client()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def run(self) -> NoReturn:
        """Fetch the keys now, and again and again, sooner after a failure. Runs until cancelled."""
        while True:
            async with self._fetching:
                await self._fetch()
            pause = self._refresh_seconds * random.uniform(0.8, 1)
            await asyncio.sleep(min(pause, self._backoff()) if self._failures_in_a_row else pause)

    async def key(self, kid: str | None, algorithm: str) -> PublicKey:
        """See `auth.KeySet.key`. Waits, for one fetch at most, only if no known key fits. Safe to cancel."""
        found = choose(self._keys, kid, algorithm)
        return found if found is not None else await self._look_again(kid, algorithm)

    async def read(self) -> tuple[Sequence[Key], Sequence[str]]:
        """The keys that are published now, and why each of the others is of no use; verifies nothing by them.

        Raises:
            UnavailableError: they cannot be fetched; the reason quotes nothing of what came.
        """
        if self._client is None:
            raise UnavailableError("the keys that verify tokens are fetched only while the bridge runs")
        try:
            async with asyncio.timeout(self._timeout):
                status, document = await _get(self._client, self._url)
            if status != httpx.codes.OK:
                raise ValueError(f"status {status}")
            return parse_jwks(document)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            raise UnavailableError(str(error) or type(error).__name__) from None

    async def _look_again(self, kid: str | None, algorithm: str) -> PublicKey:
        async with self._fetching:
            found = choose(self._keys, kid, algorithm)
            if found is None and self._clock() >= self._may_ask_at:
                try:
                    await self._fetch()
                finally:  # it failed as well if this token's client has given up
                    pause = self._backoff() if self._failures_in_a_row else UNKNOWN_SECONDS
                    self._may_ask_at = self._clock() + pause
                found = choose(self._keys, kid, algorithm)
            if found is not None:
                return found
            if self._failures_in_a_row:
                raise UnavailableError("the keys that verify tokens cannot be fetched now")
            raise UnauthorizedError("unknown key")

    async def _fetch(self) -> None:
        """Replace the keys by those that are published now; failing that, keep them. The caller holds the lock."""
        self.fetches += 1
        self._failures_in_a_row += 1  # until it has succeeded; one that is given up has not
        try:
            self._keys, ignored = await self.read()
        except UnavailableError as error:
            self.failures += 1
            self._teller.tell(
                None, logging.WARNING, "public keys cannot be fetched", url=self._url, reason=error.detail
            )
            return
        self._failures_in_a_row = 0
        kids = [key.kid for key in self._keys]
        level = logging.WARNING if ignored else logging.INFO
        self._teller.tell((kids, ignored), level, "public keys fetched", url=self._url, kids=kids, ignored=ignored)

    def _backoff(self) -> float:
        longest = min(_FIRST_BACKOFF_SECONDS * 2.0 ** min(self._failures_in_a_row - 1, 10), _LONGEST_BACKOFF_SECONDS)
        return longest * random.uniform(0.5, 1)


# -- asking ------------------------------------------------------------------------------------------------------------

_Verdict: TypeAlias = Literal["holds", "refused", "unknown"]


@dataclass
class _Question:
    """A token that the server is being asked about; those who ask the same meanwhile share the answer."""

    answered: asyncio.Event = field(default_factory=asyncio.Event)
    verdict: _Verdict | None = None


class GetUser:
    """Asks Supabase Auth whether a token holds, as `auth.get_user` does: an `auth.Confirm`, by its method `confirm`.

    For projects that sign with a legacy secret which the operator does not know: they publish no key. Slower than a
    secret, and it depends on the project: one request per token and minute. Enter it before anything verifies.

    Args:
        url: of the project.
        key: any API key of the project.
        timeout: seconds for one question, the wait for its turn included.
        clock: seconds that only ever grow.

    Attributes:
        questions: asked so far.

    Raises:
        ConfigurationError: the address is none of HTTP.
    """

    def __init__(
        self, url: str, key: str, *, timeout: float = FETCH_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.questions = 0
        self._url = _http_address(url, "SUPABASE_URL").rstrip("/") + "/auth/v1/user"
        self._key = key
        self._timeout = timeout
        self._clock = clock
        self._client: httpx.AsyncClient | None = None
        self._confirmed: OrderedDict[bytes, float] = OrderedDict()
        self._asking: dict[bytes, _Question] = {}
        self._turn = asyncio.Semaphore(_MOST_QUESTIONS)
        self._teller = _Teller()

    async def __aenter__(self) -> Self:
        self._client = _make_client()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def confirm(self, token: str, claims: Claims) -> None:
        """Return if the token holds, or has held within `CONFIRMED_SECONDS`. Safe to cancel.

        Raises:
            UnauthorizedError: Supabase Auth refuses it.
            UnavailableError: Supabase Auth does not say.
        """
        if claims.subject is None:
            raise UnauthorizedError("it is no user's, and there is no key to verify it by")
        digest = hashlib.sha256(token.encode()).digest()
        if self._confirmed.get(digest, 0.0) > self._clock():
            return
        match await self._shared_verdict(digest, token, claims.subject):
            case "refused":
                raise UnauthorizedError("Supabase Auth refuses it")
            case "unknown":
                raise UnavailableError("Supabase Auth cannot be asked about the token now")

    async def _shared_verdict(self, digest: bytes, token: str, subject: str) -> _Verdict:
        """Ask, or wait for the answer to somebody who is asking the same. Who gives up leaves it to the next."""
        while (question := self._asking.get(digest)) is not None:
            await question.answered.wait()
            if question.verdict is not None:
                return question.verdict
        question = self._asking[digest] = _Question()
        try:
            question.verdict = await self._verdict(token, subject)
        finally:
            del self._asking[digest]
            question.answered.set()
        if question.verdict == "holds":
            self._remember(digest)
        return question.verdict

    def _remember(self, digest: bytes) -> None:
        self._confirmed[digest] = self._clock() + CONFIRMED_SECONDS
        self._confirmed.move_to_end(digest)
        while len(self._confirmed) > _MOST_CONFIRMED:
            self._confirmed.popitem(last=False)

    async def _verdict(self, token: str, subject: str) -> _Verdict:
        if self._client is None:
            return "unknown"
        headers = {"apikey": self._key, "Authorization": f"Bearer {token}"}
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                self.questions += 1
                status, body = await _get(self._client, self._url, headers)
            verdict = read_user_answer(status, body, subject)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            reason = str(error) or type(error).__name__
            self._teller.tell(None, logging.WARNING, "Supabase Auth cannot be asked", url=self._url, reason=reason)
            return "unknown"
        self._teller.tell("answers", logging.INFO, "Supabase Auth answers", url=self._url)
        return verdict


def read_user_answer(status: int, body: bytes, subject: str) -> Literal["holds", "refused"]:
    """What an answer of `GET /auth/v1/user` says of the token of a user.

    Raises:
        ValueError: nothing; the gateway before Supabase Auth refuses the API key with 401 as well.
    """
    answer = orjson.loads(body)
    if not isinstance(answer, dict):
        raise ValueError("no JSON object")
    if status == httpx.codes.OK:
        if not isinstance(answer.get("id"), str):
            raise ValueError("no user")
        return "holds" if answer["id"] == subject else "refused"
    if status not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ValueError(f"status {status}")
    if "api key" in str(answer.get("message", "")).lower():
        raise ValueError("SUPABASE_KEY is refused")
    return "refused"


# -- HTTP --------------------------------------------------------------------------------------------------------------


class _Teller:
    """Logs a state only when it is another than the last."""

    def __init__(self) -> None:
        self._told: object = ()

    def tell(self, state: object, level: int, message: str, **extra: object) -> None:
        """Log `message` unless the state was told last."""
        if state != self._told:
            self._told = state
            logger.log(level, message, extra=extra)


def _http_address(url: str, variable: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError(f"{variable} is not an address that begins with https:// or http://.")
    return url


def _make_client() -> httpx.AsyncClient:
    # Redirects are not followed, and the deadline is the caller's, who sets one for the whole.
    return httpx.AsyncClient(timeout=None, headers={"Accept": "application/json", "Accept-Encoding": "identity"})  # noqa: S113


async def _get(client: httpx.AsyncClient, url: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of an answer, as it comes over the wire.

    Raises:
        ValueError: it is too large.
    """
    body = bytearray()
    async with client.stream("GET", url, headers=headers) as response:
        async for part in response.aiter_raw():
            body += part
            if len(body) > _LARGEST_ANSWER:
                raise ValueError("the answer is too large")
    return response.status_code, bytes(body)
