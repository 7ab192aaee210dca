import time
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.auth import Verifier
from realtime_bridge.errors import ForbiddenError, UnauthorizedError
from realtime_bridge.tickets import FRESH_SECONDS, MemoryTicketStore, Tickets, client_of
from tests.services import SECRET, token

BROWSER = client_of({"user-agent": "Browser/1", "origin": "https://app.example"})
OTHER = client_of({"user-agent": "Browser/2", "origin": "https://app.example"})


def tickets(store: MemoryTicketStore | None = None, **options: Any) -> Tickets:
    return Tickets(store or MemoryTicketStore(), Verifier(**{"secret": SECRET, **options}).verify)


async def refusal(of: Tickets, ticket: str, client: str | None = BROWSER, *, resuming: bool = False) -> str:
    with pytest.raises(UnauthorizedError) as caught:
        await of.redeem(ticket, client, resuming=resuming)
    return caught.value.reason


async def test_a_ticket_gives_the_claims_of_its_token() -> None:
    bureau = tickets()
    ticket, expires_in = await bureau.issue(token("ada", tenant=7))
    claims = await bureau.redeem(ticket, BROWSER)
    assert (claims.subject, claims.values["tenant"], expires_in) == ("ada", 7, 30)


async def test_a_ticket_is_not_promised_for_longer_than_its_token_lasts() -> None:
    _, expires_in = await tickets().issue(token("ada", ttl=12))
    assert 0 < expires_in <= 12


async def test_a_token_that_does_not_hold_gets_no_ticket() -> None:
    with pytest.raises(UnauthorizedError, match="expired"):
        await tickets().issue(token("ada", ttl=-1))
    with pytest.raises(ForbiddenError):
        await tickets().issue(token("ada", role="postgres"))


async def test_a_used_ticket_serves_only_to_resume_from_the_same_browser_and_page() -> None:
    bureau = tickets()
    ticket, _ = await bureau.issue(token("ada"))
    await bureau.redeem(ticket, BROWSER)
    for _ in range(3):
        assert (await bureau.redeem(ticket, BROWSER, resuming=True)).subject == "ada"
    assert "used" in await refusal(bureau, ticket)
    assert "used" in await refusal(bureau, ticket, OTHER, resuming=True)
    assert (await bureau.redeem(ticket, BROWSER, resuming=True)).subject == "ada"


async def test_what_does_not_come_back_by_itself_uses_its_ticket_up() -> None:
    bureau = tickets()
    ticket, _ = await bureau.issue(token("ada"))
    assert (await bureau.redeem(ticket)).subject == "ada"
    for client in (None, BROWSER):
        for resuming in (False, True):
            assert "used" in await refusal(bureau, ticket, client, resuming=resuming)


async def test_a_used_ticket_ends_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    bureau = tickets()
    ticket, _ = await bureau.issue(token("ada", ttl=60))
    await bureau.redeem(ticket, BROWSER)
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert await refusal(bureau, ticket, resuming=True) == "expired"


async def test_what_is_no_longer_accepted_of_a_token_ends_its_ticket() -> None:
    store = MemoryTicketStore()
    ticket, _ = await tickets(store).issue(token("ada"))
    assert await refusal(tickets(store, secret="x" * 32), ticket) == "signature"
    with pytest.raises(ForbiddenError):
        await tickets(store, roles=["anon"]).redeem(ticket, BROWSER, resuming=True)


async def test_neither_a_ticket_nor_a_store_shows_the_token() -> None:
    store = MemoryTicketStore()
    text = token("ada")
    ticket, _ = await tickets(store).issue(text)
    another, _ = await tickets(store).issue(text)
    kept = repr(store._kept)
    for part in text.split("."):
        assert part not in ticket + kept
    assert ticket not in kept
    assert ticket[:200] != another[:200]
    with pytest.raises(jwt.PyJWTError):
        jwt.decode(ticket, SECRET, algorithms=["HS256"])


@pytest.mark.parametrize("place", [0, 25, -2])
async def test_a_changed_ticket_is_refused(place: int) -> None:
    bureau = tickets()
    ticket, _ = await bureau.issue(token("ada"))
    letters = list(ticket)
    letters[place] = "A" if letters[place] != "A" else "B"
    assert "ticket" in await refusal(bureau, "".join(letters))


@given(st.text())
@pytest.mark.parametrize("garbage", ["", "A", "A" * 22, "A" * 33_000, "€", "A=", "="])
async def test_anything_else_is_refused(garbage: str, text: str) -> None:
    for ticket in (garbage, text):
        assert "ticket" in await refusal(tickets(), ticket, resuming=True)


def test_browsers_and_pages_are_told_apart() -> None:
    same = {"user-agent": "Browser/1", "origin": "https://app.example", "last-event-id": "a-1"}
    assert client_of(same) == BROWSER
    assert len({BROWSER, OTHER, client_of({"user-agent": "Browser/1"}), client_of({})}) == 4
    assert OTHER.isalnum()


# -- the store of one process; what both stores promise is in tests/contract -------------------------------------------


async def test_a_ticket_waits_so_long_for_its_first_use_and_then_it_is_dead() -> None:
    now = 1000.0
    store = MemoryTicketStore(clock=lambda: now)
    await store.put("in time", "k1")
    await store.put("too late", "k2")
    now += FRESH_SECONDS
    assert await store.take("in time", BROWSER, resuming=False) == "k1"
    now += 0.1
    for resuming in (False, True):
        assert await store.take("too late", BROWSER, resuming=resuming) is None
    now += 1e6
    assert await store.take("in time", BROWSER, resuming=True) == "k1"
