import base64
import hmac
import json
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from realtime_bridge.auth import KeySet, Verifier, bearer, require_claims
from realtime_bridge.claims import Claims
from realtime_bridge.errors import ConfigurationError, ForbiddenError, UnauthorizedError, UnavailableError

SECRET = "a-secret-of-tests-and-of-more-than-32-bytes"
SUBJECT = "6f1c9f0e-54a5-4c0e-9a39-3f0d5b8f0a11"

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
P256 = ec.generate_private_key(ec.SECP256R1())
P384 = ec.generate_private_key(ec.SECP384R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()


@dataclass
class Keys:
    """A key set of one key, or of none, that remembers what it was asked for."""

    public: Any = None
    asked: list[tuple[str | None, str]] = field(default_factory=list)

    async def key(self, kid: str | None, algorithm: str) -> Any:
        self.asked.append((kid, algorithm))
        if self.public is None:
            raise UnauthorizedError("unknown key")
        return self.public


def payload(**claims: Any) -> dict[str, Any]:
    """Good claims with some replaced; None leaves one out."""
    now = int(time.time())
    good = {"sub": SUBJECT, "role": "authenticated", "aud": "authenticated", "iat": now, "exp": now + 60}
    return {name: value for name, value in {**good, **claims}.items() if value is not None}


def signed(secret: str = SECRET, **claims: Any) -> str:
    return jwt.encode(payload(**claims), secret, algorithm="HS256")


def _segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(body: bytes, header: object = None, secret: str | bytes = SECRET) -> str:
    """A token signed with HMAC-SHA256 whatever is in it."""
    head = json.dumps({"alg": "HS256", "typ": "JWT"} if header is None else header).encode()
    text = f"{_segment(head)}.{_segment(body)}"
    key = secret.encode() if isinstance(secret, str) else secret
    return f"{text}.{_segment(hmac.digest(key, text.encode(), 'sha256'))}"


def verifier(**options: Any) -> Verifier:
    return Verifier(**{"secret": SECRET, **options})


async def refusal(token: str, **options: Any) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        await verifier(**options).verify(token)
    return caught.value.reason


# -- what holds --------------------------------------------------------------------------------------------------------


async def test_a_good_token_gives_its_claims() -> None:
    values = payload(app_metadata={"org": 7})
    claims = await verifier().verify(jwt.encode(values, SECRET, algorithm="HS256"))
    assert (claims.role, claims.subject, claims.expires_at) == ("authenticated", SUBJECT, values["exp"])
    assert claims.values == values


@pytest.mark.parametrize("audience", ["authenticated", ["other", "authenticated"]])
async def test_the_audience_may_be_a_text_or_a_list(audience: object) -> None:
    assert (await verifier().verify(signed(aud=audience))).subject == SUBJECT


async def test_role_anon_needs_neither_subject_nor_audience() -> None:
    claims = await verifier().verify(signed(role="anon", sub=None, aud=None))
    assert (claims.role, claims.subject) == ("anon", None)


async def test_role_anon_needs_an_end() -> None:
    assert await refusal(signed(role="anon", exp=None)) == "exp is missing"


@pytest.mark.parametrize(
    ("private", "algorithm"), [(RSA, "RS256"), (P256, "ES256"), (ED25519, "EdDSA")], ids=["RS256", "ES256", "EdDSA"]
)
async def test_a_public_key_verifies_its_own_algorithm(private: Any, algorithm: str) -> None:
    keys = Keys(private.public_key())
    token = jwt.encode(payload(), private, algorithm=algorithm, headers={"kid": "one"})
    assert (await verifier(keys=keys).verify(token)).subject == SUBJECT
    assert keys.asked == [("one", algorithm)]


async def test_both_kinds_of_key_may_be_live_at_once() -> None:
    both = verifier(keys=Keys(P256.public_key()))
    assert (await both.verify(signed())).subject == SUBJECT
    assert (await both.verify(jwt.encode(payload(), P256, algorithm="ES256"))).subject == SUBJECT


@pytest.mark.parametrize("name", ["nbf", "iat"])
async def test_the_clock_of_the_issuer_may_be_a_little_ahead(name: str) -> None:
    near: dict[str, Any] = {name: time.time() + 5}
    far: dict[str, Any] = {name: time.time() + 60}
    assert (await verifier().verify(signed(**near))).subject == SUBJECT
    assert await refusal(signed(**far)) == f"not valid yet ({name})"


# -- configured keys ---------------------------------------------------------------------------------------------------


async def test_a_configured_key_holds_without_signature_end_audience_and_subject() -> None:
    key = jwt.encode({"role": "service_role", "iss": "supabase"}, "another secret that is long enough for this")
    trusting = verifier(configured_keys=[key], roles=["service_role"], issuer="us")
    claims = await trusting.verify(key)
    assert (claims.role, claims.subject, claims.expires_at) == ("service_role", None, None)


async def test_a_configured_key_still_needs_a_role_that_may_connect() -> None:
    key = signed(role="service_role")
    with pytest.raises(ForbiddenError):
        await verifier(configured_keys=[key]).verify(key)


async def test_a_configured_key_that_has_ended_is_refused() -> None:
    key = signed(role="anon", exp=1_000_000_000)
    assert await refusal(key, configured_keys=[key]) == "expired"


async def test_nothing_but_the_exact_text_of_a_configured_key_is_trusted() -> None:
    key = jwt.encode({"role": "anon"}, "another secret that is long enough for this")
    for other in (key[:-4], key + "=", key + "A", " " + key, key.swapcase()):
        await refusal(other, configured_keys=[key])


@pytest.mark.parametrize("key", ["sb_secret_abc", "sb_publishable_abc", "", "a.b.c", "é.è.ê", "\ud800.a.b"])
async def test_a_configured_key_that_is_no_jwt_is_no_token(key: str) -> None:
    await refusal(key, configured_keys=[key])


# -- attacks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["none", "None", "nOnE", "", None, 7, ["HS256"], {"a": 1}, "HS512", "RS512"])
@pytest.mark.parametrize("signature", ["", "AAAA"])
async def test_only_the_four_algorithms_are_accepted(algorithm: object, signature: str) -> None:
    head = _segment(json.dumps({"alg": algorithm}).encode())
    token = f"{head}.{_segment(json.dumps(payload()).encode())}.{signature}"
    reason = await refusal(token, keys=Keys(RSA.public_key()))
    assert reason.startswith("algorithm ")
    assert reason.endswith(" not accepted")


@pytest.mark.parametrize("form", [PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1])
@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
@pytest.mark.parametrize("secret", [SECRET, None])
async def test_a_public_key_is_no_shared_secret(encoding: Encoding, form: PublicFormat, secret: str | None) -> None:
    text = RSA.public_key().public_bytes(encoding, form)
    token = raw(json.dumps(payload()).encode(), secret=text)
    keys = Keys(RSA.public_key())
    expected = "signature" if secret else "algorithm HS256 not accepted"
    assert await refusal(token, keys=keys, secret=secret) == expected
    assert keys.asked == []


@pytest.mark.parametrize("secret", [SECRET, None])
@pytest.mark.parametrize(
    "jwk", [RSAAlgorithm.to_jwk(RSA.public_key()), ECAlgorithm.to_jwk(P256.public_key())], ids=["RSA", "EC"]
)
async def test_the_text_of_a_jwk_is_no_shared_secret(jwk: str, secret: str | None) -> None:
    for text in (jwk, json.dumps(json.loads(jwk), separators=(",", ":")), *map(str, json.loads(jwk).values())):
        token = raw(json.dumps(payload()).encode(), {"alg": "HS256", "kid": "one"}, secret=text)
        expected = "signature" if secret else "algorithm HS256 not accepted"
        assert await refusal(token, keys=Keys(RSA.public_key()), secret=secret) == expected


@pytest.mark.parametrize("algorithm", ["ES256", "HS256"])
async def test_keys_that_a_token_brings_or_points_to_are_ignored(algorithm: str) -> None:
    own = ec.generate_private_key(ec.SECP256R1())
    brought = {
        "jwk": json.loads(ECAlgorithm.to_jwk(own.public_key())),
        "jku": "https://attacker.example/jwks.json",
        "x5u": "https://attacker.example/cert.pem",
        "x5c": ["MIIB"],
    }
    key: Any = own if algorithm == "ES256" else "a secret that the token brings, of more than 32 bytes"
    token = jwt.encode(payload(), key, algorithm=algorithm, headers={**brought, "kid": "one"})
    keys = Keys(P256.public_key())
    assert await refusal(token, keys=keys) == "signature"
    assert keys.asked == ([("one", "ES256")] if algorithm == "ES256" else [])


@pytest.mark.parametrize("key", ["sb_publishable_abc", "sb_secret_abc"])
@pytest.mark.parametrize("configured", [True, False])
async def test_an_opaque_api_key_is_refused_with_what_to_send_instead(key: str, configured: bool) -> None:
    reason = await refusal(key, configured_keys=[key] if configured else [])
    assert "API key" in reason
    assert "access token" in reason
    assert key not in reason


@pytest.mark.parametrize("material", [SECRET, SECRET.encode(), None.__class__, RSA.public_key(), P384.public_key()])
async def test_a_key_of_another_kind_than_the_algorithm_asks_for_is_refused(material: object) -> None:
    token = raw(json.dumps(payload()).encode(), {"alg": "ES256"})
    assert await refusal(token, keys=Keys(material)) == "the key does not fit the algorithm"


async def test_a_short_rsa_key_is_refused() -> None:
    short = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token = jwt.encode(payload(), short, algorithm="RS256")
    assert await refusal(token, keys=Keys(short.public_key())) == "the key does not fit the algorithm"


@pytest.mark.parametrize(("private", "algorithm"), [(RSA, "RS256"), (P256, "ES256"), (ED25519, "EdDSA")])
async def test_without_a_key_set_no_public_key_algorithm_is_accepted(private: Any, algorithm: str) -> None:
    assert await refusal(jwt.encode(payload(), private, algorithm=algorithm)) == f"algorithm {algorithm} not accepted"


async def test_a_token_of_an_unknown_key_is_refused() -> None:
    assert await refusal(jwt.encode(payload(), P256, algorithm="ES256"), keys=Keys()) == "unknown key"


async def test_keys_that_cannot_be_had_say_nothing_against_the_token() -> None:
    class Unreachable:
        async def key(self, kid: str | None, algorithm: str) -> Any:
            raise UnavailableError("the keys cannot be fetched")

    keys: KeySet = Unreachable()
    with pytest.raises(UnavailableError):
        await verifier(keys=keys).verify(jwt.encode(payload(), P256, algorithm="ES256"))


async def test_without_a_secret_an_empty_one_opens_nothing() -> None:
    token = raw(json.dumps(payload()).encode(), secret=b"")
    for nothing in ("", None):
        assert await refusal(token, secret=nothing) == "algorithm HS256 not accepted"


async def test_another_secret_is_refused() -> None:
    assert await refusal(signed("another secret that is long enough for this")) == "signature"


async def test_a_changed_payload_is_refused() -> None:
    head, _, signature = signed().split(".")
    body = _segment(json.dumps(payload(sub="someone else")).encode())
    assert await refusal(f"{head}.{body}.{signature}") == "signature"


@pytest.mark.parametrize(
    "header",
    [
        {"alg": "HS256", "crit": ["exp"], "exp": 1},
        {"alg": "HS256", "crit": []},
        {"alg": "HS256", "b64": False, "crit": ["b64"]},
        {"alg": "HS256", "kid": 7},
        ["HS256"],
        "HS256",
        {},
    ],
)
async def test_a_header_that_asks_for_what_we_do_not_do_is_refused(header: object) -> None:
    await refusal(raw(json.dumps(payload()).encode(), header))


# -- asking the issuer -------------------------------------------------------------------------------------------------


@dataclass
class Issuer:
    """Says of every token what it was told to, and remembers what it was asked."""

    error: Exception | None = None
    asked: list[str] = field(default_factory=list)

    async def confirm(self, token: str, claims: Claims) -> None:
        assert claims.expires_at
        self.asked.append(token)
        if self.error:
            raise self.error


async def test_without_a_secret_the_issuer_says_whether_an_hs256_token_holds() -> None:
    issuer, token = Issuer(), signed("a secret that only the issuer knows")
    claims = await verifier(secret=None, confirm=issuer.confirm).verify(token)
    assert (claims.subject, issuer.asked) == (SUBJECT, [token])
    assert await refusal(token, secret=None, confirm=Issuer(UnauthorizedError("refused")).confirm) == "refused"
    with pytest.raises(UnavailableError):
        await verifier(secret=None, confirm=Issuer(UnavailableError("not now")).confirm).verify(token)


async def test_with_a_secret_the_issuer_is_not_asked() -> None:
    issuer = Issuer()
    assert (await verifier(confirm=issuer.confirm).verify(signed())).subject == SUBJECT
    assert await refusal(signed("x" * 40), confirm=issuer.confirm) == "signature"
    assert issuer.asked == []


@pytest.mark.parametrize("algorithm", ["none", "HS512", "ES256", "RS256", "EdDSA", "hs256", None])
async def test_the_issuer_is_asked_about_no_other_algorithm(algorithm: str | None) -> None:
    issuer = Issuer()
    for keys in (None, Keys(), Keys(ED25519.public_key())):
        await refusal(
            raw(json.dumps(payload()).encode(), {"alg": algorithm}), secret=None, keys=keys, confirm=issuer.confirm
        )
    assert issuer.asked == []


@pytest.mark.parametrize(
    ("claims", "reason"),
    [({"exp": 1}, "expired"), ({"exp": None}, "exp is missing"), ({"aud": "other"}, "wrong audience")],
)
async def test_the_issuer_is_not_asked_about_what_would_not_hold_anyway(claims: dict[str, Any], reason: str) -> None:
    issuer = Issuer()
    token = raw(json.dumps({k: v for k, v in {**payload(), **claims}.items() if v is not None}).encode())
    assert await refusal(token, secret=None, confirm=issuer.confirm) == reason
    with pytest.raises(ForbiddenError):
        await verifier(secret=None, confirm=issuer.confirm).verify(signed(role="postgres"))
    await refusal(
        raw(json.dumps(payload()).encode(), {"alg": "HS256", "crit": ["x"], "x": 1}),
        secret=None,
        confirm=issuer.confirm,
    )
    await refusal(raw(b"{"), secret=None, confirm=issuer.confirm)
    assert issuer.asked == []


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": 1_000_000_000}, "expired"),
        ({"exp": -5}, "expired"),
        ({"exp": 0}, "expired"),
        ({"exp": None}, "exp is missing"),
        ({"exp": True}, "exp is not a time in seconds"),
        ({"exp": "9999999999"}, "exp is not a time in seconds"),
        ({"exp": [9999999999]}, "exp is not a time in seconds"),
        ({"exp": 10**12}, "exp is not a time in seconds"),
        ({"exp": 10**40}, "exp is not a time in seconds"),
        ({"exp": 1e300}, "exp is not a time in seconds"),
        ({"nbf": "soon"}, "nbf is not a time in seconds"),
        ({"iat": {}}, "iat is not a time in seconds"),
        ({"aud": None}, "aud is missing"),
        ({"aud": "other"}, "wrong audience"),
        ({"aud": ["other", 1, None, {}]}, "wrong audience"),
        ({"aud": {"authenticated": 1}}, "wrong audience"),
        ({"aud": []}, "wrong audience"),
        ({"sub": None}, "sub is missing"),
        ({"sub": ""}, "sub is not a text"),
        ({"sub": 7}, "sub is not a text"),
        ({"sub": ["a"]}, "sub is not a text"),
        ({"sub": 7, "role": "anon"}, "sub is not a text"),
        ({"sub": "a\x00b"}, "a claim holds the character NUL"),
        ({"app_metadata": {"name": ["\\\x00"]}}, "a claim holds the character NUL"),
        ({"a\x00b": 1}, "a claim holds the character NUL"),
    ],
)
async def test_a_claim_that_is_missing_or_wrong_is_named(claims: dict[str, Any], reason: str) -> None:
    token = raw(json.dumps({k: v for k, v in {**payload(), **claims}.items() if v is not None}).encode())
    assert await refusal(token) == reason


async def test_text_that_only_looks_like_an_escaped_nul_is_fine() -> None:
    assert (await verifier().verify(signed(sub="a\\u0000b"))).subject == "a\\u0000b"


@pytest.mark.parametrize("end", ["NaN", "Infinity", "-Infinity", "1e400", "null", "0x1"])
async def test_an_end_that_is_no_number_of_json_is_refused(end: str) -> None:
    body = f'{{"sub":"a","role":"authenticated","aud":"authenticated","exp":{end}}}'
    assert await refusal(raw(body.encode())) in ("malformed", "exp is missing")


@pytest.mark.parametrize("issuer", [None, "them", 7, ["us"]])
async def test_the_issuer_is_checked_where_one_is_set(issuer: object) -> None:
    assert (await verifier().verify(signed())).subject == SUBJECT
    for role in ("authenticated", "anon"):
        token = raw(json.dumps(payload(iss=issuer, role=role)).encode())
        assert await refusal(token, issuer="us") == "wrong issuer"
        assert (await verifier(issuer="us").verify(signed(iss="us", role=role))).role == role


@pytest.mark.parametrize("issuer", ["supabase", "supabase-demo"])
async def test_a_legacy_anon_key_is_let_in_whatever_issuer_is_set(issuer: str) -> None:
    key = signed(role="anon", iss=issuer, sub=None, aud=None)
    assert (await verifier(issuer="us").verify(key)).role == "anon"
    assert await refusal(signed(iss=issuer), issuer="us") == "wrong issuer"


@pytest.mark.parametrize("role", [None, "", 7, "postgres", "service_role", "none", "authenticated ", ["anon"], "ANON"])
async def test_a_role_that_may_not_connect_is_forbidden(role: object) -> None:
    with pytest.raises(ForbiddenError):
        await verifier().verify(signed(role=role))


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'"text"', b"7", b"null", b"{", b"\xff\xfe", b'{"sub":"\\ud800"}', b"\xef\xbb\xbf{}", b"[" * 5000],
)
async def test_a_payload_that_is_no_json_object_is_malformed(body: bytes) -> None:
    assert await refusal(raw(body)) == "malformed"


async def test_claims_nested_beyond_reason_are_refused() -> None:
    deep = json.dumps(payload())[:-1] + ',"deep":' + "[" * 300 + "]" * 300 + "}"
    assert await refusal(raw(deep.encode())) == "nested too deep"


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "malformed"),
        (".", "malformed"),
        ("..", "malformed"),
        ("a.b.c.d", "malformed"),
        ("null", "malformed"),
        ("é" * 40, "malformed"),
        ("\ud800", "malformed"),
        ("\x00.\x00.\x00", "malformed"),
        ("a" * 16_385, "too long"),
        ("€" * 20_000, "too long"),
    ],
)
async def test_garbage_is_refused(token: str, reason: str) -> None:
    assert await refusal(token) == reason


async def test_a_refusal_never_quotes_the_token() -> None:
    for token in (signed(exp=1), signed("x" * 40), raw(b"{}", {"alg": "<script>\n"}), signed(sub=None, jti="quoted")):
        reason = await refusal(token)
        assert not any(part in reason for part in [*token.split("."), "script", "quoted", "\n"] if part)


# -- anything at all ---------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["sub", "role", "aud", "exp", "iat", "nbf", "iss"]) | st.text()


async def _verdict(token: str) -> None:
    both = verifier(keys=Keys(P256.public_key()), configured_keys=[signed(role="anon")], issuer="us")
    try:
        claims = await both.verify(token)
    except (UnauthorizedError, ForbiddenError):
        return
    assert claims.role in ("anon", "authenticated")
    assert claims.encoded


@given(st.text())
async def test_any_text_is_refused_with_one_of_two_errors(text: str) -> None:
    with pytest.raises((UnauthorizedError, ForbiddenError)):
        await verifier(keys=Keys(P256.public_key())).verify(text)


@given(st.binary(), st.binary(), st.binary())
async def test_any_three_segments_are_refused_with_one_of_two_errors(head: bytes, body: bytes, end: bytes) -> None:
    with pytest.raises((UnauthorizedError, ForbiddenError)):
        await verifier().verify(f"{_segment(head)}.{_segment(body)}.{_segment(end)}")


@given(st.dictionaries(names, json_values), st.binary())
async def test_any_signed_object_and_any_signature_raise_nothing_else(values: dict[str, Any], end: bytes) -> None:
    body = json.dumps({**payload(), **values}).encode()
    await _verdict(raw(body))
    for algorithm in ("HS256", "ES256", "RS256", "EdDSA"):
        head = _segment(json.dumps({"alg": algorithm}).encode())
        await _verdict(f"{head}.{_segment(body)}.{_segment(end)}")


@given(json_values, json_values)
async def test_any_header_raises_nothing_else(algorithm: object, kid: object) -> None:
    await _verdict(raw(json.dumps(payload()).encode(), {"alg": algorithm, "kid": kid}))


# -- secrets -----------------------------------------------------------------------------------------------------------


async def test_a_weak_secret_works_and_is_told_by_a_property_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token = signed("short")
    weak = verifier(secret="short")
    assert (await weak.verify(token)).subject == SUBJECT  # and no warning, which would fail the test
    assert weak.weak_secret
    assert not verifier().weak_secret
    assert not verifier(secret=None).weak_secret


def test_a_public_key_as_secret_is_a_mistake_of_configuration() -> None:
    text = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with pytest.raises(ConfigurationError, match="SUPABASE_JWT_SECRET"):
        verifier(secret=text)


# -- where the token is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER   abc ", "abc"),
        ("Bearer", None),
        ("Bearer ", None),
        ("Basic abc", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_a_bearer_token_is_read_from_the_header(header: str | None, token: str | None) -> None:
    assert bearer(header) == token


def request(authorization: str | None = None, query: str = "") -> Request:
    headers = [(b"authorization", authorization.encode())] if authorization else []
    return Request({"type": "http", "headers": headers, "query_string": query.encode()})


async def test_a_token_in_the_query_counts_only_where_told() -> None:
    strict, lenient = require_claims(verifier()), require_claims(verifier(), token_in_query=True)
    by_query = request(query=f"token={signed()}")
    assert (await lenient(by_query)).subject == SUBJECT
    with pytest.raises(UnauthorizedError, match="missing"):
        await strict(by_query)
    with pytest.raises(UnauthorizedError, match="missing"):
        await lenient(request())


async def test_the_header_wins_over_the_query() -> None:
    both = request(f"Bearer {signed(sub='header')}", f"token={signed(sub='query')}")
    assert (await require_claims(verifier(), token_in_query=True)(both)).subject == "header"
