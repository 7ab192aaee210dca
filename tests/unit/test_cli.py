"""The command line: usage, exit statuses, and the token command."""

import time
from pathlib import Path

import jwt
import pytest

from realtime_bridge.parts import make_verifier
from realtime_bridge.settings import Settings
from tests.command_line import CommandLine
from tests.services import SECRET

FOREIGN = ("SUPABASE_URL", "SUPABASE_KEY", "SUPABASE_JWT_SECRET", "DATABASE_URL", "REDIS_URL")


@pytest.fixture
def bridge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> CommandLine:
    """A command line in an empty folder, without settings but the secret."""
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SUPABASE_JWT_SECRET", SECRET)
    monkeypatch.chdir(tmp_path)
    return CommandLine(monkeypatch, capsys)


# -- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "dev", "check", "why", "token", "tail", "teardown"])
def test_every_command_explains_itself(command: str, bridge: CommandLine) -> None:
    status, out, _ = bridge(command, "--help")
    assert status == 0
    assert "Usage: " in out
    assert command in bridge("--help")[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["polish"],
        ["check", "--colour"],
        ["teardown", "everything"],
        ["serve", "--port", "many"],
        ["serve", "--port", "65536"],
        ["serve", "--workers", "0"],
        ["dev", "--source", "mysql"],
        ["dev", "--users", "0"],
        ["token"],
        ["token", "--sub", "ada", "--ttl", "0"],
        ["why", "--table", "public.posts"],
        ["tail", "--token", "abc", "--url", "ftp://example.com"],
    ],
)
def test_bad_usage_exits_with_2_and_says_so_on_standard_error(arguments: list[str], bridge: CommandLine) -> None:
    status, out, err = bridge(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: " in err


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_missing_setting_exits_with_2_and_one_sentence(command: str, bridge: CommandLine) -> None:
    status, out, err = bridge(command)
    assert (status, out) == (2, "")
    assert err.startswith("realtime-bridge: DATABASE_URL is missing")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", [["serve"], ["check"], ["teardown"], ["token", "--sub", "ada"]])
def test_an_unknown_setting_exits_with_2_whatever_the_command(
    command: list[str], bridge: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_COLOUR", "blue")
    assert bridge(*command) == (2, "", "realtime-bridge: BRIDGE_COLOUR is not a setting of this bridge.\n")


def test_tail_needs_a_token_and_none_of_the_settings(bridge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REALTIME_BRIDGE_TOKEN", raising=False)
    status, out, err = bridge("tail")
    assert (status, out) == (2, "")
    assert err.startswith("realtime-bridge: REALTIME_BRIDGE_TOKEN or --token is missing")
    assert err.count("\n") == 1


def test_why_needs_the_database(bridge: CommandLine) -> None:
    status, out, err = bridge("why", "--user", "ada", "--table", "public.posts", "--key", "1")
    assert (status, out) == (2, "")
    assert err.startswith("realtime-bridge: DATABASE_URL is missing")


def test_several_workers_need_redis(bridge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    status, _, err = bridge("serve", "--workers", "2")
    assert (status, "REDIS_URL is missing" in err) == (2, True)


@pytest.mark.parametrize("url", ["foo", "http://x", "redis+sentinel://host", "redis+cluster://", "redis://h:99999"])
def test_a_redis_url_that_can_never_work_exits_with_2_and_one_sentence(
    url: str, bridge: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("REDIS_URL", url)
    status, out, err = bridge("serve")
    assert (status, out) == (2, "")
    assert err.startswith("realtime-bridge: REDIS_URL: ")
    assert err.count("\n") == 1


def test_a_redis_that_cannot_be_reached_exits_with_1_and_one_sentence(
    bridge: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("REDIS_URL", "redis://:hush@127.0.0.1:1/0")
    assert bridge("serve") == (1, "", "realtime-bridge: Redis at 127.0.0.1:1 cannot be reached\n")


def test_without_settings_there_is_nothing_to_tear_down(bridge: CommandLine) -> None:
    assert bridge("teardown") == (0, "There is nothing to drop.\n", "")


def test_an_engine_that_cannot_be_reached_exits_with_1(bridge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres:hush@127.0.0.1:1/none")
    status, out, err = bridge("teardown", "--yes")
    assert (status, out) == (1, "")
    assert err.startswith("realtime-bridge: Postgres at 127.0.0.1:1 cannot be reached")
    assert "hush" not in err


# -- token -------------------------------------------------------------------------------------------------------------


def verified(token: str) -> dict[str, object]:
    return dict(jwt.decode(token.strip(), SECRET, algorithms=["HS256"], audience="authenticated"))


def test_a_token_is_what_supabase_would_sign(bridge: CommandLine) -> None:
    before = int(time.time())
    status, out, err = bridge("token", "--sub", "ada")
    assert (status, err) == (0, "")
    claims = verified(out)
    assert (claims["sub"], claims["role"], claims["aud"]) == ("ada", "authenticated", "authenticated")
    assert isinstance(claims["exp"], int)
    assert isinstance(claims["iat"], int)
    assert claims["iat"] >= before
    assert claims["exp"] - claims["iat"] == 3600


def test_a_token_takes_role_lifetime_and_claims(bridge: CommandLine) -> None:
    options = ["--role", "editor", "--ttl", "60", "--claim", 'app_metadata={"org":7}', "--claim", "plan=free=yes"]
    claims = verified(bridge("token", "--sub", "ada", *options)[1])
    assert (claims["role"], claims["app_metadata"], claims["plan"]) == ("editor", {"org": 7}, "free=yes")
    assert isinstance(claims["exp"], int)
    assert isinstance(claims["iat"], int)
    assert claims["exp"] - claims["iat"] == 60


@pytest.mark.parametrize("role", ["authenticated", "anon"])
async def test_a_bridge_of_the_same_settings_lets_the_token_in(
    role: str, bridge: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGE_AUDIENCE", "readers")
    monkeypatch.setenv("BRIDGE_ISSUER", "https://issuer.example")
    printed = bridge("token", "--sub", "ada", "--role", role)[1].strip()
    claims = await make_verifier(Settings.load(whole=False)).verify(printed)
    assert (claims.role, claims.values["iss"]) == (role, "https://issuer.example")


def test_a_claim_without_a_value_exits_with_2(bridge: CommandLine) -> None:
    status, out, err = bridge("token", "--sub", "ada", "--claim", "plan")
    assert (status, out) == (2, "")
    assert "name=value" in err


def test_without_the_secret_no_token_can_be_signed(bridge: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUPABASE_JWT_SECRET")
    status, out, err = bridge("token", "--sub", "ada")
    assert (status, out) == (2, "")
    assert err.startswith("realtime-bridge: SUPABASE_JWT_SECRET is missing")
