import json
import time
import warnings
from typing import Any

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from realtime_bridge.errors import ConfigurationError, UnavailableError
from realtime_bridge.jwks import MOST_KEYS, GetUser, JwksKeySet, choose, parse_jwk, parse_jwks, read_user_answer

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
SHORT_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)
P256 = ec.generate_private_key(ec.SECP256R1())
OTHER_P256 = ec.generate_private_key(ec.SECP256R1())
ED25519 = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, **members: Any) -> dict[str, Any]:
    """A key as JWK, with some members replaced; None leaves one out."""
    algorithms: dict[type, Any] = {
        rsa.RSAPublicKey: RSAAlgorithm,
        rsa.RSAPrivateKey: RSAAlgorithm,
        ec.EllipticCurvePublicKey: ECAlgorithm,
        ec.EllipticCurvePrivateKey: ECAlgorithm,
    }
    algorithm = next((found for kind, found in algorithms.items() if isinstance(key, kind)), OKPAlgorithm)
    whole = {**json.loads(algorithm.to_jwk(key)), **members}
    return {name: value for name, value in whole.items() if value is not None}


def document(*keys: object) -> bytes:
    return orjson.dumps({"keys": keys})


# -- one key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("private", "algorithm"), [(RSA, "RS256"), (P256, "ES256"), (ED25519, "EdDSA")], ids=["RSA", "EC", "OKP"]
)
@pytest.mark.parametrize("said", [True, False])
def test_a_public_key_tells_its_algorithm_whether_it_says_it_or_not(private: Any, algorithm: str, said: bool) -> None:
    members = {"alg": algorithm, "use": "sig", "key_ops": ["verify"]} if said else {"key_ops": None}
    key = parse_jwk(jwk(private.public_key(), kid="one", **members))
    assert (key.kid, key.algorithm, key.public) == ("one", algorithm, private.public_key())


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (jwk(RSA.public_key(), alg="RS512"), "alg"),
        (jwk(RSA.public_key(), alg="HS256"), "alg"),
        (jwk(RSA.public_key(), alg=["RS256"]), "alg"),
        (jwk(P256.public_key(), alg="RS256"), "alg"),
        (jwk(RSA.public_key(), use="enc"), "signatures"),
        (jwk(RSA.public_key(), key_ops=["encrypt"]), "signatures"),
        (jwk(RSA.public_key(), key_ops="verify"), "signatures"),
        (jwk(SHORT_RSA.public_key()), "size"),
        (jwk(RSA), "private"),
        (jwk(P256), "private"),
        (jwk(ED25519), "private"),
        (jwk(ec.generate_private_key(ec.SECP384R1()).public_key()), "crv"),
        (jwk(ec.generate_private_key(ec.SECP256K1()).public_key()), "crv"),
        (jwk(ed448.Ed448PrivateKey.generate().public_key()), "crv"),
        (jwk(P256.public_key(), crv=["P-256"]), "crv"),
        (jwk(P256.public_key(), kty="RSA"), "kty"),
        ({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}, "kty"),
        ({"kty": 7}, "kty"),
        ({}, "kty"),
        (jwk(P256.public_key(), kid=7), "kid"),
        (jwk(P256.public_key(), kid="x" * 257), "kid"),
        (jwk(P256.public_key(), x=jwk(OTHER_P256.public_key())["x"]), "malformed"),
        (jwk(P256.public_key(), x=7), "malformed"),
        (jwk(P256.public_key(), y=None), "malformed"),
        (jwk(RSA.public_key(), e="AA"), "malformed"),
        (jwk(RSA.public_key(), n="€"), "malformed"),
        (jwk(RSA.public_key(), n=None), "malformed"),
        (jwk(ED25519.public_key(), x="AAAA"), "malformed"),
        ("key", "object"),
        (None, "object"),
        ([], "object"),
    ],
)
def test_a_key_that_may_not_verify_is_named_by_a_reason_that_quotes_nothing(entry: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_jwk(entry)
    assert not any(str(value) in str(caught.value) for value in (jwk(RSA.public_key())["n"], "€", "AAAA", "x" * 257))


def test_a_huge_rsa_key_is_refused_and_costs_little() -> None:
    begun = time.process_time()
    for letter in ("_", "A"):
        with pytest.raises(ValueError, match=r"size|malformed"):
            parse_jwk({"kty": "RSA", "e": "AQAB", "n": letter * 200_000})
    assert time.process_time() - begun < 5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([jwk(RSA.public_key()), jwk(P256.public_key()), jwk(ED25519.public_key())]),
    st.dictionaries(st.sampled_from(["kty", "crv", "alg", "use", "key_ops", "kid", "n", "e", "x", "y"]), json_values),
)
def test_any_members_raise_nothing_else(good: dict[str, Any], members: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cryptography's, of exponents it will no longer take
        try:
            key = parse_jwk({**good, **members})
        except ValueError:
            return
    assert key.algorithm in ("RS256", "ES256", "EdDSA")


# -- all of them -------------------------------------------------------------------------------------------------------


def test_keys_that_are_not_usable_do_not_spoil_the_others() -> None:
    keys, ignored = parse_jwks(document(jwk(SHORT_RSA.public_key()), jwk(P256.public_key(), kid="p"), 7))
    assert [(key.kid, key.algorithm) for key in keys] == [("p", "ES256")]
    assert ignored == ["an RSA key of a size that is not accepted", "not an object"]


def test_an_empty_set_is_a_set() -> None:
    assert parse_jwks(document()) == ([], [])


def test_a_repeated_kid_counts_once_per_algorithm() -> None:
    one, other = jwk(P256.public_key(), kid="k"), jwk(OTHER_P256.public_key(), kid="k")
    keys, ignored = parse_jwks(document(one, other, jwk(RSA.public_key(), kid="k")))
    assert [key.algorithm for key in keys] == ["ES256", "RS256"]
    assert keys[0].public == P256.public_key()
    assert ignored == ["kid is not unique"]


def test_only_so_many_keys_are_looked_at() -> None:
    keys, ignored = parse_jwks(document(*(jwk(P256.public_key(), kid=str(i)) for i in range(MOST_KEYS + 5))))
    assert len(keys) == MOST_KEYS
    assert ignored == ["more keys than are looked at"]


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b'{"keys":{}}', b'{"keys":null}', b"<html>", b"\xff"])
def test_what_is_no_jwks_document_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_jwks(text)


# -- choosing ----------------------------------------------------------------------------------------------------------


def chosen(kid: str | None, algorithm: str, *entries: dict[str, Any]) -> object:
    return choose(parse_jwks(document(*entries))[0], kid, algorithm)


def test_a_key_is_chosen_by_id_and_algorithm() -> None:
    entries = [
        jwk(P256.public_key(), kid="a"),
        jwk(OTHER_P256.public_key(), kid="b"),
        jwk(RSA.public_key(), kid="a"),
    ]
    assert chosen("a", "ES256", *entries) == P256.public_key()
    assert chosen("b", "ES256", *entries) == OTHER_P256.public_key()
    assert chosen("a", "RS256", *entries) == RSA.public_key()
    assert chosen("b", "RS256", *entries) is None
    assert chosen("a", "EdDSA", *entries) is None
    assert chosen("c", "ES256", *entries) is None


def test_without_an_id_in_the_token_the_only_key_that_fits_is_chosen() -> None:
    one, other = jwk(P256.public_key(), kid="a"), jwk(OTHER_P256.public_key(), kid="b")
    assert chosen(None, "ES256", one, jwk(RSA.public_key())) == P256.public_key()
    assert chosen(None, "ES256", one, other) is None
    assert chosen(None, "EdDSA", one) is None


def test_a_key_without_an_id_is_chosen_only_if_no_other_fits() -> None:
    nameless, other = jwk(P256.public_key()), jwk(OTHER_P256.public_key(), kid="b")
    assert chosen("a", "ES256", nameless, jwk(RSA.public_key(), kid="r")) == P256.public_key()
    assert chosen("a", "ES256", nameless, other) is None
    assert chosen("b", "ES256", nameless, other) == OTHER_P256.public_key()
    assert chosen(None, "ES256", nameless, jwk(OTHER_P256.public_key())) is None


# -- addresses and answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "example.com", "ftp://example.com", "https://", "http://x:99999/", "file:///etc"])
def test_an_address_that_is_none_of_http_is_a_mistake_of_configuration(url: str) -> None:
    with pytest.raises(ConfigurationError, match="SUPABASE_JWKS_URL"):
        JwksKeySet(url)
    with pytest.raises(ConfigurationError, match="SUPABASE_URL"):
        GetUser(url, "sb_secret_x")


async def test_a_key_set_that_is_not_entered_has_no_keys_now() -> None:
    with pytest.raises(UnavailableError):
        await JwksKeySet("http://127.0.0.1:1/jwks.json").key("one", "ES256")


@pytest.mark.parametrize(
    ("status", "body", "verdict"),
    [
        (200, {"id": "ada"}, "holds"),
        (200, {"id": "eve"}, "refused"),
        (401, {"code": 401, "msg": "invalid JWT"}, "refused"),
        (403, {"code": 403, "error_code": "session_not_found", "msg": "Session is gone"}, "refused"),
    ],
)
def test_supabase_auth_says_whether_a_token_holds(status: int, body: object, verdict: str) -> None:
    assert read_user_answer(status, orjson.dumps(body), "ada") == verdict


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, b"{}"),
        (200, b'{"id":7}'),
        (200, b"<html>"),
        (200, b"[]"),
        (204, b""),
        (302, b""),
        (401, b""),
        (401, b'{"message":"Invalid API key"}'),
        (401, b'{"message":"No API key found in request"}'),
        (404, b"{}"),
        (429, b'{"msg":"slow down"}'),
        (500, b"{}"),
        (503, b"<html>"),
    ],
)
def test_no_other_answer_says_anything(status: int, body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_user_answer(status, body, "ada")
