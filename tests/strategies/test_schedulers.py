"""Schedules, as functions and as what the trainer does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strategies.mixins.scheduler import cosine_with_floor, rex
from tests.tiny import prepared_pairs


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


@pytest.mark.parametrize(("steps", "warmup"), [(50, 0), (50, 1), (50, 2), (5, 5), (5, 9), (2, 1), (2, 2), (1, 0), (1, 1)])
def test_one_cycle_takes_any_number_of_warm_up_steps(build: Callable[..., Any], steps: int, warmup: int) -> None:
    trainer = build(steps, lr_scheduler="one_cycle", warmup_steps=warmup)
    trainer.create_optimizer()
    scheduler, rates = trainer.create_scheduler(steps), []
    for _ in range(steps):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        scheduler.step()
    assert all(0 <= rate <= 1.001e-3 for rate in rates)
    if warmup in range(1, steps - 1):  # of two steps the first is the lowest, and the second the last
        assert rates[0] < 1e-4 and max(rates) == pytest.approx(1e-3, rel=0.02)


def test_one_cycle_refuses_unknown_arguments(build: Callable[..., Any]) -> None:
    trainer = build(5, lr_scheduler="one_cycle", lr_scheduler_kwargs={"peak": 2})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs: one_cycle doesn't take these"):
        trainer.train()


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_go_by_metrics_are_resumed_at_the_rate_of_the_config(
    build: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    """As a trial of population-based training goes on from another's checkpoint."""
    rows = prepared_pairs(8)
    keys = {"lr_scheduler": kind, "train": rows, "evaluate": rows, "eval_steps": 1, "save_strategy": None, "save_steps": 2}
    first = build(4, learning_rate=1e-3, output_dir=str(tmp_path / "first"), **keys)
    first.train()
    for rate in (1e-3, 5e-3):
        again = build(4, learning_rate=rate, output_dir=str(tmp_path / str(rate)), **keys)
        again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
        rates = [entry["learning_rate"] for entry in again.state.log_history if "learning_rate" in entry]
        own = [entry["learning_rate"] for entry in first.state.log_history if "learning_rate" in entry]
        assert rates == pytest.approx([*own[:2], *(value * rate / 1e-3 for value in own[2:])], rel=1e-6)
