"""Steps of a run, and what happens at which of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from strategies.config import as_config
from strategies.config.schedule import RunLength, schedule_arguments, steps_per_epoch, total_steps
from tests.tiny import prepared_pairs

UNKNOWN = RunLength(None, None, None)


def cadence(length: RunLength = UNKNOWN, **keys: Any) -> dict[str, Any]:
    return schedule_arguments(as_config({"base_model": "tiny", "rl": "dpo", **keys}), length)


@pytest.mark.parametrize(
    ("rows", "world_size", "keys", "per_epoch", "total"),
    [
        (16, 1, {"micro_batch_size": 2}, 8, 8),
        (17, 1, {"micro_batch_size": 2, "num_epochs": 2}, 9, 18),
        (17, 1, {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "num_epochs": 1.5}, 3, 5),
        (17, 1, {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "dataloader_drop_last": True}, 2, 2),
        (17, 2, {"micro_batch_size": 2, "gradient_accumulation_steps": 2}, 3, 3),
        (3, 1, {"micro_batch_size": 8, "dataloader_drop_last": True}, 1, 1),
        (17, 1, {"max_steps": 5}, 17, 5),
    ],
)
def test_number_of_steps(rows: int, world_size: int, keys: dict[str, Any], per_epoch: int, total: int) -> None:
    config = as_config({"base_model": "tiny", "rl": "dpo", **keys})
    assert steps_per_epoch(rows, config, world_size) == per_epoch
    assert total_steps(rows, config, world_size) == total


@pytest.mark.parametrize("rows", [5, 8, 9])
@pytest.mark.parametrize("drop", [False, True])
def test_the_trainer_runs_that_many_steps(build: Callable[..., Any], rows: int, drop: bool) -> None:
    keys = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 1.5, "dataloader_drop_last": drop}
    trainer = build(None, train=prepared_pairs(rows), **keys)
    trainer.train()
    assert trainer.state.global_step == total_steps(rows, as_config({"base_model": "tiny", "rl": "dpo", **keys}))


@pytest.mark.parametrize(
    ("keys", "steps", "expected"),
    [
        ({"warmup_steps": 7}, 1000, 7),
        ({"warmup_ratio": 0.1}, 1009, 100),
        ({"warmup_ratio": 0.1}, None, 0.1),
        ({}, 1000, 30),
        ({}, 100_000, 100),
        ({}, None, 0.03),
    ],
)
def test_warmup(keys: dict[str, Any], steps: int | None, expected: float) -> None:
    assert cadence(RunLength(steps, steps, None), **keys)["warmup_steps"] == pytest.approx(expected)


@pytest.mark.parametrize(("steps", "expected"), [(100, 1), (1000, 5), (100_000, 10), (None, 10)])
def test_default_logging_steps(steps: int | None, expected: int) -> None:
    assert cadence(RunLength(steps, steps, None))["logging_steps"] == expected


@pytest.mark.parametrize(
    ("keys", "known", "expected"),
    [
        ({}, None, {"eval_strategy": "epoch", "save_strategy": "epoch"}),
        ({"eval_steps": 5}, None, {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "epoch"}),
        ({"save_steps": 0.25}, None, {"save_strategy": "steps", "save_steps": 0.25}),
        ({"evals_per_epoch": 3}, 10, {"eval_strategy": "steps", "eval_steps": 4}),
        ({"evals_per_epoch": 2, "num_epochs": 2}, None, {"eval_strategy": "steps", "eval_steps": 0.25}),
        ({"saves_per_epoch": 2}, 9, {"save_strategy": "steps", "save_steps": 5}),
        ({"save_strategy": "no", "eval_strategy": "no"}, None, {"eval_strategy": "no", "save_strategy": "no"}),
    ],
)
def test_when_to_evaluate_and_save(keys: dict[str, Any], known: int | None, expected: dict[str, Any]) -> None:
    found = cadence(RunLength(None, None, known), **keys)
    assert {name: found[name] for name in expected} == expected


def test_the_default_metric_grows() -> None:
    found = cadence(early_stopping_patience=2)
    assert (found["metric_for_best_model"], found["greater_is_better"]) == ("eval_rewards/accuracies", True)
    found = cadence(early_stopping_patience=2, metric_for_best_model="eval_loss")
    assert found["greater_is_better"] is False


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"load_best_model_at_end": True, "save_steps": 10},
            "load_best_model_at_end: .* evaluation is by epoch and saving by steps",
        ),
        (
            {"load_best_model_at_end": True, "save_steps": 10, "eval_steps": 4},
            r"load_best_model_at_end: save_steps \(10\) must be a multiple of eval_steps \(4\)",
        ),
        (
            {"early_stopping_patience": 2, "eval_strategy": "no"},
            "eval_strategy: .* stopping early need evaluations; got no",
        ),
    ],
)
def test_contradictions(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cadence(**keys)
