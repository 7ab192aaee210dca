"""How old a proof is, and what it proves, whatever becomes of the clocks."""

import time

import pytest

from realtime_bridge.hub.proof import Proof

CLOCK = 10_000.0
"""The time here, which stands still."""


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> Proof:
    monkeypatch.setattr(time, "time", lambda: CLOCK)
    return Proof()


def tell(proof: Proof, *told: tuple[float, float]) -> None:
    for until, now in told:
        proof.tell(until, now)


def test_nothing_is_proven_before_anything_was_told(proof: Proof) -> None:
    assert (proof.until, proof.age(5)) == (0, None)
    tell(proof, (0, 1))
    assert (proof.until, proof.age(5)) == (0, None)


def test_the_age_of_what_is_met_at_the_start_is_told_by_the_clock(proof: Proof) -> None:
    tell(proof, (9_000, 50))
    assert (proof.until, proof.age(50)) == (9_000, 1_000)


def test_what_is_told_again_is_not_new_and_what_is_later_is(proof: Proof) -> None:
    tell(proof, (9_000, 50), (9_001, 60), (9_001, 70))
    assert (proof.until, proof.age(70)) == (9_001, 10)


def test_a_clock_that_was_set_back_costs_one_proof(proof: Proof) -> None:
    tell(proof, (9_999, 50), (6_400, 51))
    assert (proof.until, proof.age(52)) == (6_400, 51 - 50 + 2)
    tell(proof, (6_401, 53))
    assert (proof.until, proof.age(54)) == (6_401, 1)


def test_nothing_is_proven_of_a_time_that_has_not_come_nor_more_as_it_comes(
    proof: Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(proof, (9_999, 50), (13_600, 51))
    assert (proof.until, proof.age(52)) == (CLOCK, 1)
    monkeypatch.setattr(time, "time", lambda: CLOCK + 60)
    tell(proof, (13_600, 111))
    assert (proof.until, proof.age(111)) == (CLOCK, 60)
    tell(proof, (10_058, 112), (10_059, 113))
    assert (proof.until, proof.age(113)) == (10_059, 0)


def test_what_is_of_the_future_at_the_start_says_nothing_until_something_new_comes(proof: Proof) -> None:
    tell(proof, (13_600, 50), (13_600, 51))
    assert (proof.until, proof.age(51)) == (0, None)
    tell(proof, (9_999, 52))
    assert (proof.until, proof.age(52)) == (9_999, None)
    tell(proof, (10_000, 53))
    assert (proof.until, proof.age(53)) == (10_000, 0)


def test_where_the_clock_here_is_behind_proofs_count_all_the_same(proof: Proof) -> None:
    tell(proof, (13_600, 50), (13_601, 51), (13_602, 52))
    assert (proof.until, proof.age(53)) == (CLOCK, 1)


def test_a_fork_takes_back_what_was_proven_and_going_back_is_nothing_new(proof: Proof) -> None:
    tell(proof, (9_000, 50), (9_001, 51), (0, 52))
    assert (proof.until, proof.age(52)) == (0, None)
    tell(proof, (8_990, 53))
    assert (proof.until, proof.age(61)) == (8_990, 10)
    tell(proof, (8_991, 62))
    assert (proof.until, proof.age(62)) == (8_991, 0)


def test_two_brokers_found_by_turns_prove_nothing_new(proof: Proof) -> None:
    tell(proof, (9_000, 50), (9_001, 51))
    for now in range(52, 70, 2):
        tell(proof, (8_990, now), (9_001, now + 1))
    assert proof.age(71) == 20
