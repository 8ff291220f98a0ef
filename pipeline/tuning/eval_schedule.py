"""Evaluation and checkpoint schedule of trials: often enough for a scheduler to compare them."""

from __future__ import annotations

import math
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import UserError
from strategies.config.schedule import RunLength, schedule_arguments

__all__ = ["evaluations_of", "with_cadence"]

EVALUATIONS = 8
"""Evaluations per run under a scheduler, where the recipe sets no evaluation schedule."""


def with_cadence(cfg: RunConfig) -> RunConfig:
    """Return a sweep's recipe with default evaluations, and checkpoints if the scheduler resumes trials from them.

    Raises:
        UserError: for a recipe without evaluations, or whose checkpoint schedule differs from that of evaluations.
    """
    assert cfg.tune is not None
    if not cfg.test_datasets and not cfg.val_set_size:
        raise UserError("tune: trials are compared by evaluations; set val_set_size or test_datasets")
    if cfg.eval_strategy == "no":
        raise UserError("eval_strategy: trials are compared by evaluations, got no; remove the key")
    if cfg.tune.scheduler == "none":
        return cfg
    changes: dict[str, Any] = {}
    if cfg.eval_strategy is None and cfg.eval_steps is None and cfg.evals_per_epoch is None:
        if cfg.max_steps is not None:
            # With max_steps a run may end within its first epoch, before an evaluation by epochs.
            changes["eval_steps"] = max(1, cfg.max_steps // EVALUATIONS)
        else:
            changes["evals_per_epoch"] = math.ceil(EVALUATIONS / cfg.num_epochs)
    if cfg.tune.scheduler in ("hyperband", "pbt"):
        changes |= _checkpoints(cfg, changes)
    return cfg.model_copy(update=changes)


def _checkpoints(cfg: RunConfig, added: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that save a checkpoint at every evaluation."""
    assert cfg.tune is not None
    why = f"scheduler: {cfg.tune.scheduler} goes on from the checkpoints of evaluations"
    if cfg.save_only_model:
        raise UserError(f"save_only_model: {why}, which then have no optimizer; remove it")
    expected = {
        save: added.get(evaluate, getattr(cfg, evaluate))
        for save, evaluate in (
            ("save_strategy", "eval_strategy"),
            ("save_steps", "eval_steps"),
            ("saves_per_epoch", "evals_per_epoch"),
        )
    }
    for name, value in expected.items():
        if getattr(cfg, name) not in (None, value):
            advice = ", ".join(f"{key}: {setting}" for key, setting in expected.items() if setting is not None)
            raise UserError(f"{name}: {why}; remove the key, or write {advice or 'save_strategy: epoch'}")
    return {name: value for name, value in expected.items() if value is not None}


def evaluations_of(cfg: RunConfig, scheduler: str, steps: int, steps_per_epoch: int) -> int:
    """Count the evaluations of a run of `steps` steps, including the one at its end.

    Raises:
        UserError: when a scheduler needs more.
    """
    try:
        arguments = schedule_arguments(cfg, RunLength(steps, steps, steps_per_epoch))
    except ValueError as error:
        raise UserError(str(error)) from error
    every: float = arguments["eval_steps"] if arguments["eval_strategy"] == "steps" else steps_per_epoch
    # Below 1, transformers takes it as a part of the run, and rounds up.
    every = every if every >= 1 else max(1, math.ceil(steps * every))
    count = max(1, math.ceil(steps / every))
    if count < 2 and scheduler != "none":
        raise UserError(
            f"tune.scheduler: {scheduler} compares trials at their evaluations, and a run of {steps} steps has one; "
            "set evals_per_epoch or eval_steps so that it has more"
        )
    return count
