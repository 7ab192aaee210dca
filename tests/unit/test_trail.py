from hypothesis import given
from hypothesis import strategies as st

from realtime_bridge.broker.trail import IDS_KEPT, Lineage, Trail


def ids(branch: str, *numbers: int) -> list[str]:
    return [f"{branch}{number}" for number in numbers]


def trail_of(*numbers: int, branch: str = "a") -> Trail:
    trail = Trail()
    trail.restart("e1", numbers[0] - 1, ids(branch, numbers[0] - 1) if numbers[0] > 1 else ())
    trail.extend(numbers[0], trail.id, ids(branch, *numbers))
    return trail


def test_a_new_trail_has_seen_nothing() -> None:
    trail = Trail()
    assert trail.mark == ("", 0, "")
    assert trail.id_of(0) == ""
    assert trail.id_of(1) is None
    trail = trail_of(5)
    trail.forget()
    assert trail.mark == ("", 0, "")


def test_ids_are_remembered_by_number() -> None:
    trail = trail_of(5, 6, 7)
    assert trail.mark == ("e1", 7, "a7")
    assert (trail.first, trail.id_of(4), trail.id_of(6), trail.id_of(3), trail.id_of(8)) == (4, "a4", "a6", None, None)


def test_what_is_known_already_changes_nothing() -> None:
    trail = trail_of(5, 6, 7)
    trail.extend(5, "a4", ids("a", 5, 6))
    trail.extend(6, "a5", ids("a", 6, 7, 8))
    assert trail.mark == ("e1", 8, "a8")
    assert [trail.id_of(number) for number in range(5, 9)] == ids("a", 5, 6, 7, 8)


def test_another_branch_is_not_mixed_in() -> None:
    trail = trail_of(5, 6, 7)
    trail.extend(6, "a5", ids("b", 6, 7, 8))
    trail.extend(8, "b7", ids("b", 8))
    assert trail.mark == ("e1", 7, "a7")


def test_a_hole_makes_it_begin_anew() -> None:
    trail = trail_of(5, 6)
    trail.extend(9, "a8", ids("a", 9, 10))
    assert trail.mark == ("e1", 10, "a10")
    assert (trail.id_of(8), trail.id_of(6)) == ("a8", None)


def test_rewinding_forgets_what_came_after() -> None:
    trail = trail_of(5, 6, 7)
    trail.rewind("e2", 6)
    assert trail.mark == ("e2", 6, "a6")
    trail.rewind("e3", 9)
    assert trail.mark == ("e3", 6, "a6")
    trail.rewind("e4", 0)
    assert trail.mark == ("e4", 0, "")


def test_it_is_bounded() -> None:
    trail = trail_of(*range(1, 3 * IDS_KEPT))
    assert trail.number - trail.first + 1 == IDS_KEPT
    assert trail.id_of(trail.first) == f"a{trail.first}"


def test_a_lineage_gives_the_lowest_fork_on_the_way() -> None:
    lineage = Lineage((("e4", 30), ("e3", 10), ("e2", 20), ("e1", None)))
    assert [lineage.common(epoch) for epoch in ("e3", "e2", "e1", "e0")] == [30, 10, 10, None]


def test_nothing_is_known_beyond_an_epoch_without_parent() -> None:
    lineage = Lineage((("e2", None), ("e1", 5)))
    assert lineage.common("e1") is None


@given(st.lists(st.tuples(st.sampled_from(["extend", "rewind"]), st.integers(1, 30), st.integers(1, 5))))
def test_a_trail_equals_the_branch_it_follows(steps: list[tuple[str, int, int]]) -> None:
    trail = Trail()
    trail.restart("e", 0, ())
    branch: list[str] = []
    for turn, (step, at, count) in enumerate(steps):
        if step == "extend":
            start = min(at, len(branch) + 1)
            overlap = branch[start - 1 :][:count]
            new = overlap + [f"{turn}.{i}" for i in range(count - len(overlap))]
            trail.extend(start, branch[start - 2] if start > 1 else "", new)
            branch[start - 1 : start - 1 + count] = new
        else:
            trail.rewind("e", min(at, len(branch)))
            del branch[at:]
        assert [trail.id_of(number) for number in range(1, trail.number + 1)] == branch
