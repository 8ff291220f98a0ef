"""Reward functions as judges."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.evaluation.rewards import load_judges


def test_a_judge_has_a_name_of_its_own() -> None:
    paths = ["tests.reward_functions.length", "tests.reward_functions.abstain", "tests.reward_functions.length"]
    assert [judge.name for judge in load_judges(paths)] == [paths[0], "abstain", paths[2]]
    assert [judge.name for judge in load_judges(paths[:2])] == ["length", "abstain"]


def test_what_isnt_judged_is_nan() -> None:
    [length, abstain] = load_judges(["tests.reward_functions.length", "tests.reward_functions.abstain"])
    assert length.rewards(["Why?"], ["So."], [[1]], {}).tolist() == [3.0]
    assert np.isnan(abstain.rewards(["Why?"], ["So."], [[1]], {})).all()


def test_what_can_t_judge() -> None:
    with pytest.raises(UserError, match="--reward: .* is a reward model; evaluation takes functions"):
        load_judges(["owner/name"])
    with pytest.raises(UserError, match="--reward.0: .* must be|--reward.0: .* is no function but int"):
        load_judges(["tests.reward_functions.NOT_A_FUNCTION"])
