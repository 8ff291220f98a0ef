"""Schedules, as functions and as what the trainer does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from strategies.schedulers import cosine_with_floor, rex


def test_cosine_with_floor() -> None:
    at = [cosine_with_floor(step, warmup=10, total=110, floor=0.2) for step in (0, 5, 10, 60, 110, 200)]
    assert at == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2, 0.2])


def test_cosine_stays_constant_after_its_end() -> None:
    at = [cosine_with_floor(step, warmup=0, total=100, floor=0.1, end=0.8) for step in (0, 40, 80, 99)]
    assert at == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_rex() -> None:
    at = [rex(step, warmup=10, total=110, floor=0.0) for step in (5, 10, 60, 110)]
    assert at == pytest.approx([0.5, 1.0, 0.5 / 0.75, 0.0])
    assert rex(60, warmup=10, total=110, floor=0.5) == pytest.approx(0.5 + 0.5 * 0.5 / 0.75)


def test_a_run_that_only_warms_up_does_not_divide_by_zero() -> None:
    assert rex(5, warmup=5, total=5, floor=0.3) == pytest.approx(0.3)
    assert cosine_with_floor(7, warmup=5, total=5, floor=0.3) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lr_scheduler": "rex", "cosine_min_lr_ratio": 0.1}, [0.0, 0.5, 1.0, 0.1 + 0.9 * (2 / 3) / (5 / 6)]),
        ({"cosine_min_lr_ratio": 0.1}, [0.0, 0.5, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2]),
        ({"cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.6}, [0.0, 0.5, 1.0, 0.1]),
        ({"lr_scheduler": "cosine"}, [0.0, 0.5, 1.0, (1 + math.cos(math.pi / 3)) / 2]),
        ({"lr_scheduler": "constant"}, [1.0, 1.0, 1.0, 1.0]),
    ],
    ids=["rex", "floor", "constant_tail", "transformers_cosine", "transformers_constant"],
)
def test_learning_rates_of_a_run(build: Callable[..., Any], keys: dict[str, Any], expected: list[float]) -> None:
    trainer = build(5, warmup_steps=2, **keys)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[:4] == pytest.approx([1e-3 * part for part in expected], rel=1e-4)


def test_one_cycle_rises_and_falls_with_each_groups_own_peak(build: Callable[..., Any]) -> None:
    trainer = build(10, lr_scheduler="one_cycle", warmup_ratio=0.4, embedding_lr=1e-4)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    peaks = {group["name"]: [] for group in trainer.optimizer.param_groups}
    for _ in range(10):
        for group in trainer.optimizer.param_groups:
            peaks[group["name"]].append(group["lr"])
        trainer.optimizer.step()
        scheduler.step()
    assert peaks["base"].index(max(peaks["base"])) == 3
    assert max(peaks["base"]) == pytest.approx(1e-3)
    assert max(peaks["embeddings_no_decay"]) == pytest.approx(1e-4)
    assert trainer.optimizer.param_groups[0]["betas"][0] == 0.9


def test_one_cycle_refuses_unknown_arguments(build: Callable[..., Any]) -> None:
    trainer = build(5, lr_scheduler="one_cycle", lr_scheduler_kwargs={"peak": 2})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs: one_cycle doesn't take these"):
        trainer.train()
