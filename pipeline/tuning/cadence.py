"""When trials evaluate and save: often enough for a scheduler to compare them."""

from __future__ import annotations

import math
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import UserError

__all__ = ["evaluations_of", "with_cadence"]

EVALUATIONS = 8
"""Of a run whose recipe doesn't say when to evaluate, where a scheduler compares runs by their evaluations."""


def with_cadence(cfg: RunConfig) -> RunConfig:
    """The recipe of a sweep with evaluations, and checkpoints where trials go on from them, added where it says nothing.

    Raises:
        UserError: for a recipe without evaluations, or one whose checkpoints don't go with them.
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
            changes["eval_steps"] = max(1, cfg.max_steps // EVALUATIONS)
        else:
            changes["evals_per_epoch"] = math.ceil(EVALUATIONS / cfg.num_epochs)
    if cfg.tune.scheduler in ("hyperband", "pbt"):
        changes |= _checkpoints(cfg, changes)
    return cfg.model_copy(update=changes)


def _checkpoints(cfg: RunConfig, added: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint at every evaluation."""
    assert cfg.tune is not None
    why = f"scheduler: {cfg.tune.scheduler} goes on from the checkpoints of evaluations"
    if cfg.save_only_model:
        raise UserError(f"save_only_model: {why}, which then have no optimizer; remove it")
    wanted = {
        save: added.get(evaluate, getattr(cfg, evaluate))
        for save, evaluate in (
            ("save_strategy", "eval_strategy"),
            ("save_steps", "eval_steps"),
            ("saves_per_epoch", "evals_per_epoch"),
        )
    }
    for name, value in wanted.items():
        if getattr(cfg, name) not in (None, value):
            asked = ", ".join(f"{key}: {one}" for key, one in wanted.items() if one is not None)
            raise UserError(f"{name}: {why}; remove the key, or write {asked or 'save_strategy: epoch'}")
    return {name: value for name, value in wanted.items() if value is not None}


def evaluations_of(cfg: RunConfig, scheduler: str, steps: int, steps_per_epoch: int) -> int:
    """How often a run of so many steps evaluates, its end counted.

    Raises:
        UserError: when that is less than a scheduler needs.
    """
    from strategies.cadence import RunLength, cadence_arguments

    try:
        found = cadence_arguments(cfg, RunLength(steps, steps, steps_per_epoch))
    except ValueError as error:
        raise UserError(str(error)) from error
    every: float = found["eval_steps"] if found["eval_strategy"] == "steps" else steps_per_epoch
    every = every if every >= 1 else max(1, math.ceil(steps * every))
    number = max(1, math.ceil(steps / every))
    if number < 2 and scheduler != "none":
        raise UserError(
            f"tune.scheduler: {scheduler} compares trials at their evaluations, and a run of {steps} steps has one; "
            "set evals_per_epoch or eval_steps so that it has more"
        )
    return number
