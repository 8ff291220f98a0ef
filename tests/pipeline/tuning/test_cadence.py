"""When trials evaluate and save."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from pipeline.errors import UserError
from pipeline.tuning.eval_schedule import evaluations_of, with_cadence


def recipe(scheduler: str = "none", **keys: Any) -> RunConfig:
    section = {"space": {"learning_rate": {"uniform": [1e-6, 1e-5]}}, "scheduler": scheduler}
    given = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "val_set_size": 4, "tune": section, **keys}
    return parse_config({name: value for name, value in given.items() if value is not None})


def test_a_recipe_that_says_nothing_evaluates_often_enough_to_compare() -> None:
    assert with_cadence(recipe()).evals_per_epoch is None
    assert with_cadence(recipe("asha")).evals_per_epoch == 8
    assert with_cadence(recipe("asha", num_epochs=3)).evals_per_epoch == 3
    assert with_cadence(recipe("median", max_steps=80)).eval_steps == 10
    assert with_cadence(recipe("asha", eval_steps=7)).eval_steps == 7


def test_schedulers_that_go_on_from_checkpoints_save_at_every_evaluation() -> None:
    assert with_cadence(recipe("asha")).saves_per_epoch is None
    assert with_cadence(recipe("pbt", num_epochs=2)).saves_per_epoch == 4
    assert with_cadence(recipe("hyperband", eval_steps=7)).save_steps == 7
    assert with_cadence(recipe("pbt", eval_steps=7, save_steps=7)).save_steps == 7


@pytest.mark.parametrize(
    ("scheduler", "keys", "message"),
    [
        ("none", {"val_set_size": None}, "tune: trials are compared by evaluations; set val_set_size or test_datasets"),
        ("none", {"eval_strategy": "no"}, "eval_strategy: trials are compared by evaluations, got no"),
        ("pbt", {"eval_steps": 5, "save_steps": 10}, "save_steps: scheduler: pbt .* or write save_steps: 5"),
        ("hyperband", {"save_strategy": "no"}, "save_strategy: scheduler: hyperband .* write saves_per_epoch: 8"),
        ("pbt", {"save_only_model": True}, "save_only_model: scheduler: pbt .* no optimizer"),
    ],
)
def test_what_does_not_go_with_a_sweep(scheduler: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_cadence(recipe(scheduler, **keys))


@pytest.mark.parametrize(
    ("keys", "steps", "number"),
    [
        ({"eval_steps": 10}, 40, 4),
        ({"eval_steps": 15}, 40, 3),
        ({"eval_steps": 0.25}, 40, 4),
        ({"evals_per_epoch": 2, "num_epochs": 2}, 40, 4),
        ({"num_epochs": 2}, 40, 2),
        ({}, 20, 1),
    ],
)
def test_evaluations_of_a_run(keys: dict[str, Any], steps: int, number: int) -> None:
    assert evaluations_of(recipe(**keys), "none", steps, steps_per_epoch=20) == number


def test_one_evaluation_is_nothing_to_schedule_by() -> None:
    with pytest.raises(UserError, match="asha compares trials at their evaluations, and a run of 20 steps has one"):
        evaluations_of(recipe(eval_steps=20), "asha", 20, steps_per_epoch=20)
