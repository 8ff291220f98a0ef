"""The reward of GSM8K: the number after the last mark."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.maths_rewards import final_number
from strategies.rewards import load_reward_functions

ANSWER = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 1,200"


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("So it is\n#### 1200", 1.0),
        ("####1,200.", 1.0),
        ("#### $1,200.00 in all", 1.0),
        ("#### 7, no:\n#### 1200", 1.0),
        ("#### 1200, no:\n#### 7", 0.0),
        ("#### -1200", 0.0),
        ("#### 12001", 0.0),
        ("#### 1200.5", 0.0),
        ("It is 1200", 0.0),
        ("#### , or ####", 0.0),
        ("", 0.0),
        ([{"role": "assistant", "content": "#### 1200"}], 1.0),
    ],
)
def test_a_completion_earns_its_last_number(completion: Any, reward: float) -> None:
    assert final_number([completion], [ANSWER], question=["How many?"]) == [reward]


def test_an_answer_without_a_number_judges_nobody() -> None:
    assert final_number(["#### 3", "#### 3"], ["#### none", "#### 3"]) == [None, 1.0]


def test_decimals_and_signs() -> None:
    assert final_number(["#### .5", "#### -3.0"], ["#### 0.50", "#### -3"]) == [1.0, 1.0]


def test_a_recipe_can_name_it() -> None:
    (function,) = load_reward_functions(["strategies.maths_rewards.final_number"])
    given = {"prompts": [""], "completions": ["#### 2"], "completion_ids": [[1]], "trainer_state": None}
    assert function(**given, log_extra=None, log_metric=None, question=[""], answer=["#### 2"]) == [1.0]
