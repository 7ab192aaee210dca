from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.broker.redis_url import RedisUrl, parse_redis_url
from realtime_bridge.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://localhost", RedisUrl("single", hosts=(("localhost", 6379),))),
        ("redis://h:7000/", RedisUrl("single", hosts=(("h", 7000),))),
        ("redis://h:7000/3", RedisUrl("single", hosts=(("h", 7000),), database=3)),
        ("redis://:p%40ss%2F@h", RedisUrl("single", hosts=(("h", 6379),), password="p@ss/")),
        ("redis://me:a:b@h", RedisUrl("single", hosts=(("h", 6379),), username="me", password="a:b")),
        ("redis://me:a@b@h", RedisUrl("single", hosts=(("h", 6379),), username="me", password="a@b")),
        ("redis://[::1]:7000/1", RedisUrl("single", hosts=(("::1", 7000),), database=1)),
        ("redis://my_redis-1.internal", RedisUrl("single", hosts=(("my_redis-1.internal", 6379),))),
        ("rediss://h", RedisUrl("single", tls=True, hosts=(("h", 6379),))),
        (
            "rediss://h?ssl_cert_reqs=none&ssl_check_hostname=false&ssl_ca_certs=/etc/ca.pem",
            RedisUrl(
                "single",
                tls=True,
                hosts=(("h", 6379),),
                tls_options={"ssl_cert_reqs": "none", "ssl_check_hostname": False, "ssl_ca_certs": "/etc/ca.pem"},
            ),
        ),
        ("unix:///run/redis.sock", RedisUrl("unix", path="/run/redis.sock")),
        ("unix://u:p@/run/a%20b?db=2", RedisUrl("unix", path="/run/a b", database=2, username="u", password="p")),
        (
            "redis+sentinel://a,b:7001/main/2",
            RedisUrl("sentinel", hosts=(("a", 26379), ("b", 7001)), service="main", database=2),
        ),
        (
            "rediss+sentinel://:p@a/main?sentinel_username=s&sentinel_password=q",
            RedisUrl(
                "sentinel",
                tls=True,
                hosts=(("a", 26379),),
                service="main",
                password="p",
                sentinel_username="s",
                sentinel_password="q",
            ),
        ),
        ("redis+cluster://a:1,[fe80::1]:2", RedisUrl("cluster", hosts=(("a", 1), ("fe80::1", 2)))),
        ("redis+cluster://a/0", RedisUrl("cluster", hosts=(("a", 6379),))),
        ("rediss+cluster://u:p@a", RedisUrl("cluster", tls=True, hosts=(("a", 6379),), username="u", password="p")),
    ],
)
def test_every_form_is_read(text: str, expected: RedisUrl) -> None:
    assert parse_redis_url(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "redis://host:6379/0"),
        ("localhost:6379", "redis://host:6379/0"),
        ("http://h", "scheme"),
        ("redis+tls://h", "scheme"),
        ("redis://", "host"),
        ("redis://:6379", "host"),
        ("redis://h:0", "port"),
        ("redis://h:65536", "port"),
        ("redis://h:port", "host"),
        ("redis://a,b", "several hosts"),
        ("redis://a b", "host"),
        ("redis://h/one", "database"),
        ("redis://h/1/2", "database"),
        ("redis://h#1", "redis://host:6379/0"),
        ("redis://h?db=1", "query"),
        ("redis://h?ssl_cert_reqs=none", "query"),
        ("redis://h?socket_timeout=1", "query"),
        ("rediss://h?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("rediss://h?ssl_cert_reqs=none&ssl_cert_reqs=none", "each once"),
        ("redis://user@h", "password"),
        ("redis://user:@h", "password"),
        ("unix://run/redis.sock", "absolute"),
        ("unix://", "path"),
        ("unix:///s?db=x", "db"),
        ("redis+sentinel://a,b", "service"),
        ("redis+sentinel://a,,b/main", "host"),
        ("redis+sentinel://a/main/x", "database"),
        ("redis+cluster://a/1", "database 0"),
        ("redis+cluster://a,b/x", "database"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        parse_redis_url(text)
    assert str(caught.value).startswith("REDIS_URL: ")


@pytest.mark.parametrize(
    "text", ["redis://u:hunter2@h h", "redis://u:hunter2@h?hunter2=1", "hunter2://u:p@h", "redis://u:hunter2/x@h"]
)
def test_an_error_holds_no_secret(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_redis_url(text)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_what_is_shown_holds_no_secret() -> None:
    url = parse_redis_url("redis+sentinel://me:hunter2@a,b:1/main?sentinel_password=hunter3")
    assert str(url) == "main of a:26379, b:1"
    assert "hunter" not in repr(url)


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for start in ("", "redis://", "rediss+sentinel://h/", "redis://h?", "unix:///"):
        with suppress(ConfigurationError):
            assert parse_redis_url(start + text).kind
