"""For which runs of a host a failure of its workers counts, and which leave."""

from __future__ import annotations

import pytest

from pipeline.training.host_failures import Judgement, judge
from pipeline.training.turn_note import SEVERAL

ALL = frozenset("abc")


def restarts(left: int = 0, names: str = "abc") -> dict[str, int]:
    return dict.fromkeys(names, left)


@pytest.mark.parametrize("lacked_memory", [False, True])
def test_a_failure_of_several_counts_for_none_and_they_take_turns(lacked_memory: bool) -> None:
    for names in ("a", "abc"):
        found = judge(restarts(names=names), SEVERAL, lacked_memory=lacked_memory)
        assert found == Judgement(frozenset(), takes_turns=True)
    found = judge(restarts(), SEVERAL, lacked_memory=lacked_memory, took_turns=True)
    # Nobody is alone because others leave at the same time.
    assert found == Judgement(ALL, alone=ALL, takes_turns=True)
    assert judge(restarts(1), "b", lacked_memory=False, took_turns=True) == Judgement(frozenset("b"), takes_turns=True)


def test_a_run_without_others_has_failed() -> None:
    only = frozenset("a")
    for turn in ("a", None):
        for lacked_memory in (False, True):
            assert judge(restarts(names="a"), turn, lacked_memory=lacked_memory) == Judgement(only, failed=only)


def test_the_failure_of_a_run_that_has_ended_is_nobody_elses() -> None:
    assert judge(restarts(), "d", lacked_memory=True) == Judgement(frozenset())


def test_a_failure_in_a_turn_counts_for_one_run() -> None:
    assert judge(restarts(1), "b", lacked_memory=False) == Judgement(frozenset("b"))
    assert judge({"a": 0, "b": 1, "c": 0}, "b", lacked_memory=False) == Judgement(frozenset("b"))
    assert judge({"a": 1, "b": 0, "c": 1}, "b", lacked_memory=False) == Judgement(frozenset("b"), alone=frozenset("b"))


def test_a_run_in_whose_turn_memory_ran_out_leaves_with_restarts_left() -> None:
    assert judge(restarts(9), "b", lacked_memory=True) == Judgement(frozenset("b"), alone=frozenset("b"))
    assert judge(restarts(9, "b"), "b", lacked_memory=True) == Judgement(frozenset("b"))


def test_before_any_turn_it_counts_for_all_and_no_other_run_is_at_fault() -> None:
    assert judge(restarts(1), None, lacked_memory=True) == Judgement(ALL)
    assert judge({"a": 0, "b": 1, "c": 0}, None, lacked_memory=True) == Judgement(ALL, failed=frozenset("ac"))


def test_nothing_counts_for_a_run_that_leaves_which_was_beside_the_others_still() -> None:
    for turn, expected in (
        ("a", Judgement(frozenset())),
        ("b", Judgement(frozenset("b"), alone=frozenset("b"))),
        (None, Judgement(frozenset("b"), failed=frozenset("b"))),
    ):
        assert judge(restarts(names="ab"), turn, lacked_memory=False, leaving="a") == expected
