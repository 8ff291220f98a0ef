"""For which runs of a host a failure of its workers counts, and which leave."""

from __future__ import annotations

import pytest

from pipeline.training.host_failures import Judgement, judge
from pipeline.training.turn_note import SEVERAL

ALL = frozenset("abc")


def restarts(left: int = 0, names: str = "abc") -> dict[str, int]:
    return dict.fromkeys(names, left)


@pytest.mark.parametrize("lacked_memory", [False, True])
def test_nobody_is_alone_because_others_leave_at_the_same_time(lacked_memory: bool) -> None:
    assert judge(restarts(), SEVERAL, lacked_memory) == Judgement(ALL, alone=ALL)


def test_a_run_without_others_has_failed() -> None:
    only = frozenset("a")
    for turn in ("a", SEVERAL, None):
        for lacked_memory in (False, True):
            assert judge(restarts(names="a"), turn, lacked_memory) == Judgement(only, failed=only)


def test_a_failure_in_a_turn_counts_for_one_run() -> None:
    assert judge(restarts(1), "b", False) == Judgement(frozenset("b"))
    assert judge({"a": 0, "b": 1, "c": 0}, "b", False) == Judgement(frozenset("b"))
    assert judge({"a": 1, "b": 0, "c": 1}, "b", False) == Judgement(frozenset("b"), alone=frozenset("b"))


def test_a_run_in_whose_turn_memory_ran_out_leaves_with_restarts_left() -> None:
    assert judge(restarts(9), "b", True) == Judgement(frozenset("b"), alone=frozenset("b"))
    assert judge(restarts(9, "b"), "b", True) == Judgement(frozenset("b"))


def test_before_any_turn_it_counts_for_all_and_no_other_run_is_at_fault() -> None:
    assert judge(restarts(1), None, True) == Judgement(ALL)
    assert judge({"a": 0, "b": 1, "c": 0}, None, True) == Judgement(ALL, failed=frozenset("ac"))


def test_nothing_counts_for_a_run_that_leaves_which_was_beside_the_others_still() -> None:
    assert judge(restarts(names="ab"), "a", False, leaving="a") == Judgement(frozenset())
    assert judge(restarts(names="ab"), "b", False, leaving="a") == Judgement(frozenset("b"), alone=frozenset("b"))
    assert judge(restarts(names="ab"), None, False, leaving="a") == Judgement(frozenset("b"), failed=frozenset("b"))
