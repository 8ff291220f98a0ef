"""A run that goes on from another one's checkpoint has that one's weights, moments and place, and its own settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Build = Callable[..., Any]


def rates(trainer: Any) -> dict[int, float]:
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rex", "constant", "one_cycle"])
def test_the_schedule_goes_on_from_its_place_at_the_new_learning_rate(build: Build, tmp_path: Path, schedule: str) -> None:
    keys = {"lr_scheduler": schedule, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "warmup_steps": 2}
    origin = build(8, learning_rate=1e-3, output_dir=str(tmp_path / "origin"), **keys)
    origin.train()
    other = build(8, learning_rate=4e-3, weight_decay=0.3, adam_beta2=0.9, output_dir=str(tmp_path / "other"), **keys)
    other.train(resume_from_checkpoint=str(tmp_path / "origin" / "checkpoint-3"))
    for step in range(4, 9):
        assert rates(other)[step] == pytest.approx(4 * rates(origin)[step], abs=1e-12)
    for group in other.optimizer.param_groups:
        assert group["weight_decay"] in (0.0, 0.3) and group["betas"][1] == 0.9
    assert any(group["weight_decay"] == 0.3 for group in other.optimizer.param_groups)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rex", "one_cycle"])
def test_a_longer_schedule_begins_at_once(build: Build, tmp_path: Path, schedule: str) -> None:
    """A run that has ended, its rate near 0, goes on at the rates of a run that was so long from the start."""
    keys = {"lr_scheduler": schedule, "save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "warmup_steps": 2}
    build(4, output_dir=str(tmp_path / "short"), **keys).train()
    longer = build(8, output_dir=str(tmp_path / "longer"), **keys)
    seen = []
    step = longer.create_optimizer().step
    longer.optimizer.step = lambda *args, **more: (seen.append(longer.optimizer.param_groups[0]["lr"]), step(*args, **more))[1]
    longer.train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-4"))
    whole = build(8, output_dir=str(tmp_path / "whole"), **keys)
    whole.train()
    expected = [rates(whole)[step] for step in range(5, 9)]
    assert seen == [rates(longer)[step] for step in range(5, 9)] == pytest.approx(expected, abs=1e-12)


def test_weights_and_moments_come_along(build: Build, tmp_path: Path) -> None:
    keys = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler": "constant", "warmup_steps": 0}
    origin = build(3, learning_rate=1e-3, output_dir=str(tmp_path / "origin"), **keys)
    origin.train()
    moments = [state["exp_avg_sq"].clone() for state in origin.optimizer.state.values()]
    # A learning rate at which nothing moves: what is there came from the checkpoint.
    other = build(4, learning_rate=1e-30, rl_beta=0.7, output_dir=str(tmp_path / "other"), **keys)
    other.train(resume_from_checkpoint=str(tmp_path / "origin" / "checkpoint-3"))
    for mine, theirs in zip(other.model.parameters(), origin.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert other.beta == 0.7 and other.state.global_step == 4
    for state, before in zip(other.optimizer.state.values(), moments, strict=True):
        assert state["step"] == 4
        assert not torch.equal(state["exp_avg_sq"], torch.zeros_like(before))
    manifest = json.loads(next((tmp_path / "origin" / "checkpoint-3").glob("manifest-*.json")).read_text())
    assert manifest["step"] == 3
