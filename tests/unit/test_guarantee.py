"""What is said to be survived, and what is told as a resync, by settings and by what Redis says of itself."""

import asyncio
from contextlib import suppress

import pytest

from realtime_bridge.broker.base import Durability
from realtime_bridge.guarantee import Flow, Guarantor, guarantee
from realtime_bridge.settings import Settings
from tests.services import eventually

POSTGRES = {"DATABASE_URL": "postgresql://localhost/x", "SUPABASE_JWT_SECRET": "s" * 32}
SUPABASE = {"SUPABASE_URL": "https://x.supabase.co", "SUPABASE_KEY": "k", **POSTGRES}


def settings(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return Settings.load(env_file=None)


def said(sentences: list[str], words: str) -> bool:
    return any(words in sentence for sentence in sentences)


SAFE = Durability("always", replicas=2)


@pytest.mark.parametrize(
    ("given", "durability", "words", "is_survived"),
    [
        (POSTGRES, SAFE, "restarts of Postgres", True),
        (SUPABASE, SAFE, "breaks of the link to Supabase", False),
        (SUPABASE, SAFE, "updated_at, and at most 10,000 rows, are compared", True),
        (POSTGRES, None, "a restart of this process", False),
        (POSTGRES, SAFE, "the end of any one process", True),
        (POSTGRES, SAFE, "crashes of Redis", True),
        (SUPABASE, SAFE, "crashes of Redis", True),
        (POSTGRES, Durability("every second"), "crashes of Redis", True),
        (SUPABASE, Durability("every second"), "crashes of Redis", False),
        (POSTGRES, Durability("snapshots"), "crashes of Redis", False),
        (POSTGRES, Durability("none"), "crashes of Redis", False),
        (POSTGRES, Durability("unknown"), "crashes of Redis", False),
        (POSTGRES, Durability("always"), "no replica", False),
        (POSTGRES, SAFE, "failovers of Redis", True),
        (SUPABASE, SAFE, "failovers of Redis", False),
        (POSTGRES, Durability("always", evicts=True), "shortage of memory", False),
    ],
)
def test_each_misfortune_stands_on_one_side(
    given: dict[str, str],
    durability: Durability | None,
    words: str,
    is_survived: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = guarantee(settings(given, monkeypatch), durability, 86_400)
    assert (said(found.survived, words), said(found.told, words)) == (is_survived, not is_survived)


def test_nothing_is_said_of_a_shortage_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    found = guarantee(settings(POSTGRES, monkeypatch), SAFE, 86_400)
    assert not said(found.told + found.survived, "shortage")


async def test_how_long_a_reader_may_be_away_follows_the_rate_of_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = Flow(0, 0)
    chosen = settings({**POSTGRES, "BRIDGE_HISTORY_SIZE": "1000"}, monkeypatch)
    monkeypatch.setattr("realtime_bridge.guarantee._LOOK_SECONDS", 0.05)
    guarantor = Guarantor(chosen, None, lambda: flow)
    assert said(guarantor.guarantee.survived, "up to 24 hours")
    running = asyncio.create_task(guarantor.run())
    await asyncio.sleep(0)  # it looks at once
    flow = Flow(10_000_000, 1_000_000_000)
    await eventually(lambda: said(guarantor.guarantee.survived, "up to 0 seconds"))
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_whatever_else_holds_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = [Durability("always"), Durability("always"), Durability("every second")]
    found += [Durability("snapshots"), Durability("none"), Durability("none"), Durability("none", replicas=1)]
    looks = iter(found)
    flow = 0

    async def ask() -> Durability:
        if (durability := next(looks, None)) is None:
            await asyncio.Event().wait()
        assert durability is not None
        return durability

    def busier() -> Flow:
        nonlocal flow
        flow = 10 * flow + 1
        return Flow(flow, 1000 * flow)

    monkeypatch.setattr("realtime_bridge.guarantee._LOOK_SECONDS", 0.0)
    caplog.set_level("INFO", "realtime_bridge.guarantee")
    chosen = settings({**POSTGRES, "BRIDGE_HISTORY_SIZE": "1000"}, monkeypatch)
    running = asyncio.create_task(Guarantor(chosen, ask, busier).run())
    await eventually(lambda: next(iter(caplog.records[4:]), None))
    running.cancel()
    about = [vars(record)["survived"] + vars(record)["told"] for record in caplog.records]
    words = [
        "every append is on its disk",
        "its newest second",
        "its last snapshot",
        "keeps nothing",
        "within some seconds",
    ]
    assert [word in text for word, text in zip(words, about, strict=True)] == [True] * 5
