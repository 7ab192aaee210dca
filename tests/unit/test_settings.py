"""Settings: what is wrong stops the start with one sentence that names the variable."""

import os
from pathlib import Path

import pytest

from realtime_bridge.errors import ConfigurationError
from realtime_bridge.settings import Settings

GOOD = {"DATABASE_URL": "postgresql://u:hidden@h/d", "SUPABASE_JWT_SECRET": "s" * 32}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("BRIDGE_", "SUPABASE_")) or name in ("DATABASE_URL", "REDIS_URL"):
            monkeypatch.delenv(name)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)


def test_defaults_are_the_contract() -> None:
    settings = Settings.load()
    assert settings.tables == ("public.posts",)
    assert settings.roles == ("anon", "authenticated")
    assert settings.source_kind == "postgres"
    assert (settings.history_size, settings.history_bytes, settings.history_seconds) == (100_000, 268_435_456, 86_400)
    assert settings.redis_url is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("BRIDGE_TYPO", "1", "BRIDGE_TYPO is not a setting"),
        ("BRIDGE_TABLES", "posts", "BRIDGE_TABLES: 'posts' is not of the form schema.table"),
        ("BRIDGE_CANARY_TABLE", "canary", "BRIDGE_CANARY_TABLE: 'canary' is not of the form schema.table"),
        ("BRIDGE_CANARY_TABLE", "public.posts", "BRIDGE_CANARY_TABLE is one of BRIDGE_TABLES"),
        ("BRIDGE_REPAIR_ROWS", "-1", "BRIDGE_REPAIR_ROWS: input should be greater than or equal to 0"),
        ("BRIDGE_POLICIES", "{oops", "BRIDGE_POLICIES: not JSON"),
        ("BRIDGE_POLICIES", "[1]", "BRIDGE_POLICIES: not a JSON object"),
        ("BRIDGE_HISTORY_SIZE", "0", "BRIDGE_HISTORY_SIZE: input should be greater than 0"),
        ("BRIDGE_PING_SECONDS", "soon", "BRIDGE_PING_SECONDS: input should be a valid number"),
        ("BRIDGE_PING_SECONDS", "inf", "BRIDGE_PING_SECONDS: input should be a finite number"),
        ("BRIDGE_PING_SECONDS", "nan", "BRIDGE_PING_SECONDS: input should be a finite number"),
        ("BRIDGE_FACT_SECONDS", "Infinity", "BRIDGE_FACT_SECONDS: input should be a finite number"),
        ("BRIDGE_ALLOWED_ORIGINS", "example.com", "BRIDGE_ALLOWED_ORIGINS: 'example.com' is not of the form"),
        ("BRIDGE_ALLOWED_ORIGINS", "https://a.example,b.example", "BRIDGE_ALLOWED_ORIGINS: 'b.example' is not of"),
        ("BRIDGE_ALLOWED_ORIGINS", "https://a.example/page", "BRIDGE_ALLOWED_ORIGINS: 'https://a.example/page' is"),
        ("BRIDGE_ALLOWED_ORIGINS", "https://*.example", "BRIDGE_ALLOWED_ORIGINS: 'https://*.example' is not of"),
        ("BRIDGE_SLOT", "No Slot", "BRIDGE_SLOT: use lower-case letters"),
        ("BRIDGE_SOURCE", "kafka", "BRIDGE_SOURCE: input should be 'postgres' or 'supabase'"),
        ("BRIDGE_SOURCE", "supabase", "SUPABASE_URL is missing"),
        ("BRIDGE_NAMESPACE", "a{b}", "BRIDGE_NAMESPACE: string should match"),
    ],
)
def test_a_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        Settings.load()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_origins_may_have_any_scheme_and_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    origins = ("https://a.example", "http://localhost:5173/", "capacitor://localhost", "http://[::1]:80", "null", "*")
    monkeypatch.setenv("BRIDGE_ALLOWED_ORIGINS", ", ".join(origins))
    assert Settings.load().allowed_origins == origins


def test_the_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("BRIDGE_TABLES=public.a,public.b\nBRIDGE_SLOT=from_file\nPGHOST=elsewhere\n")
    monkeypatch.setenv("BRIDGE_SLOT", "from_environment")
    settings = Settings.load(env_file=env_file)
    assert settings.tables == ("public.a", "public.b")
    assert settings.slot == "from_environment"


def test_an_unknown_name_in_the_file_is_refused_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("POSTGRES_PASSWORD=x\n")
    Settings.load(env_file=env_file)
    env_file.write_text("BRIDGE_HISTROY_SIZE=1\n")
    with pytest.raises(ConfigurationError, match="BRIDGE_HISTROY_SIZE"):
        Settings.load(env_file=env_file)


def test_without_a_database_every_table_needs_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATABASE_URL")
    monkeypatch.setenv("SUPABASE_URL", "https://x.supabase.co")
    monkeypatch.setenv("SUPABASE_KEY", "sb_secret_x")
    with pytest.raises(ConfigurationError, match=r"BRIDGE_POLICIES has no rule for public\.posts"):
        Settings.load()
    monkeypatch.setenv("BRIDGE_POLICIES", '{"public.posts": "user_id = auth.uid()"}')
    assert Settings.load().source_kind == "supabase"


def test_without_a_way_to_verify_tokens_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUPABASE_JWT_SECRET")
    with pytest.raises(ConfigurationError, match="SUPABASE_JWT_SECRET"):
        Settings.load()


def test_secrets_do_not_show_in_the_representation() -> None:
    assert "hidden" not in repr(Settings.load())
    assert "s" * 32 not in repr(Settings.load())
