"""Public keys over real HTTP, and real tokens, through all that may happen to either."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from realtime_bridge.auth import Verifier
from realtime_bridge.dev.processes import reserve_port
from realtime_bridge.dev.supabase import LocalSupabase
from realtime_bridge.errors import UnauthorizedError, UnavailableError
from realtime_bridge.jwks import CONFIRMED_SECONDS, UNKNOWN_SECONDS, GetUser, JwksKeySet
from tests.services import SECRET, eventually, token

pytestmark = pytest.mark.integration

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
P256 = ec.generate_private_key(ec.SECP256R1())
NEXT_P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()
PROJECT_SECRET = "a secret that only the project knows"

Answer = tuple[int, bytes]


@dataclass
class Server:
    """An HTTP server that answers everything alike, and counts what it was asked."""

    url: str = ""
    status: int = 200
    body: bytes = b'{"keys":[]}'
    headers: bytes = b""
    requests: list[bytes] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    """Answers wait until this is set."""

    def publish(self, **keys: Any) -> None:
        """Answer with public keys, by kid."""
        self.status, self.body = 200, orjson.dumps({"keys": [jwk(key, kid) for kid, key in keys.items()]})

    def answer(self, status: int, body: bytes = b"") -> None:
        self.status, self.body = status, body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            await self.open.wait()
            head = b"HTTP/1.1 %d Told\r\nContent-Length: %d\r\nConnection: close\r\n%b\r\n"
            writer.write(head % (self.status, len(self.body), self.headers) + self.body)
            await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    state = Server()
    state.open.set()
    server = await asyncio.start_server(state.serve, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys.json"
    try:
        yield state
    finally:
        state.open.set()
        server.close()
        await server.wait_closed()


def jwk(private: Any, kid: str) -> dict[str, Any]:
    public = private.public_key()
    if isinstance(private, rsa.RSAPrivateKey):
        entry = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(private, ec.EllipticCurvePrivateKey):
        entry = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        entry = OKPAlgorithm.to_jwk(public, as_dict=True)
    return {**entry, "kid": kid, "use": "sig"}


def signed(private: Any, algorithm: str, kid: str | None = None, sub: str = "ada") -> str:
    payload = jwt.decode(token(sub), SECRET, algorithms=["HS256"], audience="authenticated")
    return jwt.encode(payload, private, algorithm=algorithm, headers={"kid": kid} if kid else None)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(keys: JwksKeySet) -> AsyncIterator[JwksKeySet]:
    """A key set with its background task, in a task group as in the bridge, after its first fetch."""
    async with keys, asyncio.TaskGroup() as tasks:
        task = tasks.create_task(keys.run())
        await eventually(lambda: keys.fetches)
        yield keys
        task.cancel()


def all_at_once(verify: Callable[[str], Awaitable[object]], *tokens: str) -> Awaitable[list[Any]]:
    return asyncio.gather(*(verify(text) for text in tokens), return_exceptions=True)


# -- public keys -------------------------------------------------------------------------------------------------------


async def test_every_kind_of_key_is_live_at_once_and_fetched_before_it_is_needed() -> None:
    async with serving() as server:
        server.publish(r=RSA, p=P256, e=ED25519)
        async with running(JwksKeySet(server.url)) as keys:
            verify = Verifier(secret=SECRET, keys=keys).verify
            await eventually(lambda: keys._keys)
            good = [signed(RSA, "RS256", "r"), signed(P256, "ES256", "p"), signed(ED25519, "EdDSA", "e"), token("ada")]
            for text in good:
                assert (await verify(text)).subject == "ada"
        assert len(server.requests) == 1


async def test_a_token_that_comes_before_the_first_answer_waits_for_it() -> None:
    async with serving() as server:
        server.publish(p=P256)
        server.open.clear()
        async with running(JwksKeySet(server.url)) as keys, asyncio.TaskGroup() as tasks:
            verified = tasks.create_task(Verifier(secret=None, keys=keys).verify(signed(P256, "ES256", "p")))
            await eventually(lambda: server.requests)
            server.open.set()
            assert (await verified).subject == "ada"
        assert len(server.requests) == 1


async def test_algorithms_are_not_confused() -> None:
    public = RSA.public_key()
    forms = [
        public.public_bytes(encoding, form)
        for encoding in (Encoding.PEM, Encoding.DER)
        for form in (PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1)
    ]
    forms += [orjson.dumps(jwk(RSA, "r")), jwk(RSA, "r")["n"].encode()]
    head = {"kid": "r"}
    payload = jwt.decode(signed(RSA, "RS256"), options={"verify_signature": False})
    # PyJWT refuses to sign so itself; whoever attacks has no such scruples.
    signer = jwt.PyJWS()
    signer.unregister_algorithm("HS256")
    signer.register_algorithm("HS256", Unscrupulous(Unscrupulous.SHA256))
    forged = [signer.encode(orjson.dumps(payload), form, algorithm="HS256", headers=head) for form in forms]
    forged.append(jwt.encode(payload, "", algorithm="none", headers=head))
    forged.append(signed(P256, "ES256", "r"))
    forged.append(signed(ED25519, "EdDSA", "p"))
    forged.append(signed(NEXT_P256, "ES256", "p"))
    async with serving() as server:
        server.publish(r=RSA, p=P256)
        async with running(JwksKeySet(server.url)) as keys:
            for secret in (SECRET, None):
                verify = Verifier(secret=secret, keys=keys).verify
                assert (await verify(signed(RSA, "RS256", "r"))).subject == "ada"
                for text in forged:
                    with pytest.raises(UnauthorizedError):
                        await verify(text)


class Unscrupulous(jwt.algorithms.HMACAlgorithm):
    def prepare_key(self, key: str | bytes) -> bytes:
        assert isinstance(key, bytes)
        return key

    def check_key_length(self, key: bytes) -> str | None:
        return None


# -- rotation ----------------------------------------------------------------------------------------------------------


async def test_a_new_key_is_found_by_one_fetch_however_many_tokens_come_with_it() -> None:
    async with serving() as server:
        server.publish(old=P256)
        async with running(JwksKeySet(server.url)) as keys:
            verify = Verifier(secret=SECRET, keys=keys).verify
            await verify(signed(P256, "ES256", "old"))
            server.publish(old=P256, new=NEXT_P256)
            results = await all_at_once(verify, *(signed(NEXT_P256, "ES256", "new", f"user {i}") for i in range(50)))
            assert [claims.subject for claims in results] == [f"user {i}" for i in range(50)]
            for text in (signed(P256, "ES256", "old"), token("ada")):
                assert (await verify(text)).subject == "ada"
        assert len(server.requests) == 2


async def test_unknown_keys_cause_one_fetch_in_30_seconds() -> None:
    clock = Clock()
    async with serving() as server:
        server.publish(p=P256)
        async with JwksKeySet(server.url, clock=clock) as keys:
            verify = Verifier(secret=None, keys=keys).verify
            await verify(signed(P256, "ES256", "p"))
            for expected in (1, 2, 3):
                strangers = [signed(NEXT_P256, "ES256", f"unknown {i}") for i in range(30)]
                refused = await all_at_once(verify, *strangers)
                assert {str(error) for error in refused} == {"token refused: unknown key"}
                assert len(server.requests) == keys.fetches == expected
                clock.now += UNKNOWN_SECONDS - 0.1
                await all_at_once(verify, *strangers)
                assert len(server.requests) == expected
                clock.now += 0.2


async def test_a_withdrawn_key_verifies_nothing_after_the_next_refresh() -> None:
    async with serving() as server:
        server.publish(old=P256, new=NEXT_P256)
        async with running(JwksKeySet(server.url, refresh_seconds=0.02)) as keys:
            verify = Verifier(secret=None, keys=keys).verify
            await verify(signed(P256, "ES256", "old"))
            server.publish(new=NEXT_P256)

            async def refused() -> bool:
                [result] = await all_at_once(verify, signed(P256, "ES256", "old"))
                return isinstance(result, UnauthorizedError)

            assert await eventually(refused)
            await verify(signed(NEXT_P256, "ES256", "new"))


# -- failures ----------------------------------------------------------------------------------------------------------


async def test_while_keys_were_never_had_tokens_are_not_refused_but_put_off() -> None:
    clock = Clock()
    async with serving() as server:
        server.answer(500)
        async with JwksKeySet(server.url, clock=clock) as keys:
            verify = Verifier(secret=SECRET, keys=keys).verify
            results = await all_at_once(verify, *[signed(P256, "ES256", "p")] * 20)
            assert {type(error) for error in results} == {UnavailableError}
            assert results[0].close_code == 1013
            assert len(server.requests) == 1
            assert (await verify(token("ada"))).subject == "ada"  # the secret needs no keys
            server.publish(p=P256)
            clock.now += 1
            assert (await verify(signed(P256, "ES256", "p"))).subject == "ada"


@pytest.mark.parametrize(
    ("status", "body"),
    [(500, b""), (404, b"{}"), (302, b""), (200, b"<html>"), (200, b'{"keys":7}'), (200, b" " * 300_000), (200, b"")],
)
async def test_a_failed_fetch_takes_no_key_away_and_refuses_no_unknown_one(status: int, body: bytes) -> None:
    clock = Clock()
    async with serving() as server:
        server.publish(p=P256)
        server.headers = b"Location: /elsewhere\r\n"
        async with JwksKeySet(server.url, clock=clock) as keys:
            verify = Verifier(secret=None, keys=keys).verify
            await verify(signed(P256, "ES256", "p"))
            clock.now += UNKNOWN_SECONDS
            server.answer(status, body)
            with pytest.raises(UnavailableError):
                await verify(signed(NEXT_P256, "ES256", "new"))
            assert (await verify(signed(P256, "ES256", "p"))).subject == "ada"
            server.publish(new=NEXT_P256)
            clock.now += 1
            assert (await verify(signed(NEXT_P256, "ES256", "new"))).subject == "ada"
        assert (keys.fetches, keys.failures) == (3, 1)


async def test_a_server_that_answers_nothing_is_given_up_after_the_timeout() -> None:
    async with serving() as server:
        server.open.clear()
        async with JwksKeySet(server.url, timeout=0.05) as keys:
            verify = Verifier(secret=None, keys=keys).verify
            results = await all_at_once(verify, *[signed(P256, "ES256", "p")] * 5)
            assert {type(error) for error in results} == {UnavailableError}
        assert len(server.requests) == 1


async def test_a_server_that_is_not_there_says_nothing_of_a_token() -> None:
    with reserve_port() as nobody:
        async with JwksKeySet(f"http://127.0.0.1:{nobody.getsockname()[1]}/keys.json") as keys:
            with pytest.raises(UnavailableError):
                await keys.key("p", "ES256")


async def test_keys_that_could_not_be_had_are_tried_again_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_bridge.jwks._FIRST_BACKOFF_SECONDS", 0.01)
    async with serving() as server:
        server.answer(500)
        async with running(JwksKeySet(server.url)) as keys:
            await eventually(lambda: keys.failures > 1)
            server.publish(p=P256)
            await eventually(lambda: keys._keys)
            count = len(server.requests)
            assert await keys.key("p", "ES256") == P256.public_key()
            assert len(server.requests) == count


async def test_a_client_that_gives_up_waiting_leaves_the_fetch_to_the_next() -> None:
    clock = Clock()
    async with serving() as server:
        server.publish(p=P256)
        server.open.clear()
        async with JwksKeySet(server.url, clock=clock) as keys:
            first = asyncio.ensure_future(keys.key("p", "ES256"))
            await eventually(lambda: server.requests)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            with pytest.raises(UnavailableError):  # not "unknown key"
                await keys.key("p", "ES256")
            server.open.set()
            clock.now += 1
            assert await keys.key("p", "ES256") == P256.public_key()


async def test_each_change_of_state_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "realtime_bridge.jwks")
    one, two = jwk(P256, "p"), jwk(NEXT_P256, "n")
    async with serving() as server:
        async with JwksKeySet(server.url) as keys:
            for answer in ([one], None, [one], [one, two], [{"kty": "oct", "k": "c2VjcmV0"}]):
                server.answer(200 if answer else 500, orjson.dumps({"keys": answer}))
                for _ in range(3):
                    async with keys._fetching:
                        await keys._fetch()
    fetched, failed = "public keys fetched", "public keys cannot be fetched"
    assert [record.message for record in caplog.records] == [fetched, failed, fetched, fetched, fetched]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO", "INFO", "WARNING"]
    assert "c2VjcmV0" not in str([vars(record) for record in caplog.records])


# -- asking Supabase Auth ----------------------------------------------------------------------------------------------


async def test_a_legacy_token_is_confirmed_by_the_project_itself(database: str) -> None:
    project = LocalSupabase(database, jwt_secret=PROJECT_SECRET, service_key="sb_secret_s", anon_key="sb_publishable_a")
    subject = str(uuid4())
    async with project, GetUser(project.url, "sb_secret_s") as get_user:
        async with JwksKeySet(f"{project.url}/auth/v1/.well-known/jwks.json") as keys:
            verify = Verifier(secret=None, keys=keys, confirm=get_user.confirm).verify
            for _ in range(3):
                assert (await verify(token(subject, secret=PROJECT_SECRET))).subject == subject
            with pytest.raises(UnauthorizedError):
                await verify(token(subject, secret="another secret, which is not the project's"))
            with pytest.raises(UnauthorizedError, match="unknown key"):
                await verify(signed(P256, "ES256", "p"))


async def test_a_question_is_asked_once_and_its_answer_holds_for_a_minute() -> None:
    clock = Clock()
    async with serving() as server:
        server.answer(200, b'{"id":"ada"}')
        server.open.clear()
        async with GetUser(server.url, "sb_secret_s", clock=clock) as get_user, asyncio.TaskGroup() as tasks:
            verify = Verifier(secret=None, confirm=get_user.confirm).verify
            text = token("ada")
            waiting = [tasks.create_task(verify(text)) for _ in range(20)]
            await eventually(lambda: server.requests)
            waiting[0].cancel()  # who gives up leaves the question to the next
            await eventually(lambda: len(server.requests) == 2)
            server.open.set()
            assert [(await one).subject for one in waiting[1:]] == ["ada"] * 19
            clock.now += CONFIRMED_SECONDS - 1
            await verify(text)
            assert get_user.questions == len(server.requests) == 2
            clock.now += 1
            await verify(text)
            assert get_user.questions == 3
        head = server.requests[0].decode()
        assert head.startswith("GET /keys.json/auth/v1/user ")
        assert "apikey: sb_secret_s\r\n" in head
        assert f"Authorization: Bearer {text}\r\n" in head


async def test_a_project_that_cannot_say_refuses_nobody_and_is_asked_again() -> None:
    async with serving() as server:
        server.answer(503)
        async with GetUser(server.url, "sb_secret_s") as get_user:
            verify = Verifier(secret=None, confirm=get_user.confirm).verify
            for status, body in ((503, b""), (401, b'{"message":"Invalid API key"}'), (429, b"{}")):
                server.answer(status, body)
                with pytest.raises(UnavailableError):
                    await verify(token("ada"))
            server.answer(200, b'{"id":"ada"}')
            assert (await verify(token("ada"))).subject == "ada"
            server.answer(403, b'{"error_code":"bad_jwt","msg":"invalid"}')
            with pytest.raises(UnauthorizedError):
                await verify(token("eve"))
            with pytest.raises(UnauthorizedError):
                await verify(token(None, role="anon"))
        assert len(server.requests) == 5


async def test_a_project_is_asked_only_so_much_at_once_and_remembers_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_bridge.jwks._MOST_QUESTIONS", 3)
    monkeypatch.setattr("realtime_bridge.jwks._MOST_CONFIRMED", 2)
    async with serving() as server:
        server.answer(200, b'{"id":"ada"}')
        server.open.clear()
        async with GetUser(server.url, "sb_secret_s") as get_user, asyncio.TaskGroup() as tasks:
            verify = Verifier(secret=None, confirm=get_user.confirm).verify
            asked = [tasks.create_task(verify(token("ada", jti=str(i)))) for i in range(9)]
            await eventually(lambda: len(server.requests) == 3)
            assert get_user.questions == 3
            server.open.set()
            assert len([await one for one in asked]) == 9
            assert len(get_user._confirmed) == 2
            assert not get_user._asking
