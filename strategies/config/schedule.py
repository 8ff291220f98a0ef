"""Number of steps of a run, and the schedule of warm-up, logging, evaluation, saving and stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from strategies.methods.registry import get_strategy

__all__ = ["RunLength", "schedule_arguments", "steps_per_epoch", "total_steps"]


@dataclass(frozen=True)
class RunLength:
    """Length of a run as far as known before it starts; `None` means unknown."""

    total_steps: int | None
    """Optimizer steps of the run, if fixed."""
    expected_steps: int | None
    """Optimizer steps of the run: fixed, or computed from the number of rows."""
    steps_per_epoch: int | None


def steps_per_epoch(num_rows: int, cfg: Any, world_size: int = 1) -> int:
    """Return the optimizer steps of one epoch, including a last, incomplete global batch unless `dataloader_drop_last`."""
    return get_strategy(cfg.rl).steps_per_epoch(num_rows, cfg, world_size)


def total_steps(num_rows: int, cfg: Any, world_size: int = 1) -> int:
    """Return the optimizer steps of a run over `num_rows` rows: `max_steps` if set, else `num_epochs` epochs."""
    return cfg.max_steps or math.ceil(cfg.num_epochs * steps_per_epoch(num_rows, cfg, world_size))


def schedule_arguments(cfg: Any, length: RunLength) -> dict[str, Any]:
    """Return the arguments of warm-up, logging, evaluation, saving and selection.

    Raises:
        ValueError: if the best checkpoint is to be selected, but evaluation and saving happen at different steps.
    """
    arguments = {
        "warmup_steps": _warmup(cfg, length.expected_steps),
        "logging_strategy": "steps",
        "logging_steps": cfg.logging_steps or _logging_steps(length.expected_steps),
        "logging_first_step": True,
        "eval_on_start": cfg.eval_on_start,
        **_when(cfg, "eval", length),
        **_when(cfg, "save", length),
    }
    if _selects(cfg):
        if arguments["eval_strategy"] == "no":
            raise ValueError("eval_strategy: choosing the best checkpoint and stopping early need evaluations; got no")
        # Also without load_best_model_at_end: early stopping and save_strategy: best read the metric.
        arguments.update(_selection(cfg))
    if cfg.load_best_model_at_end:
        _check_best(arguments)
    return _evaluate_before_saving(arguments, length)


def _evaluate_before_saving(arguments: dict[str, Any], length: RunLength) -> dict[str, Any]:
    """Schedule evaluations at the end of epochs by steps if checkpoints are: otherwise one that is due at the step of a
    checkpoint would be lost when the run resumes from it."""
    is_mixed = (arguments["eval_strategy"], arguments["save_strategy"]) == ("epoch", "steps")
    if not is_mixed or length.steps_per_epoch is None or length.expected_steps is None:
        return arguments
    if length.expected_steps % length.steps_per_epoch:
        return arguments  # a run that ends within an epoch is evaluated at its end only by epoch
    return {**arguments, "eval_strategy": "steps", "eval_steps": length.steps_per_epoch}


def _warmup(cfg: Any, steps: int | None) -> float:
    """Return warm-up steps, or if the number of steps is unknown a fraction below 1 (transformers accepts both)."""
    if cfg.warmup_steps is not None:
        return cfg.warmup_steps
    if steps is None:
        ratio = 0.03 if cfg.warmup_ratio is None else cfg.warmup_ratio
        # From 1 on, transformers takes it as a number of steps.
        return min(ratio, 1 - 1e-9)
    if cfg.warmup_ratio is not None:
        return int(cfg.warmup_ratio * steps)
    return min(int(0.03 * steps), 100)


def _logging_steps(steps: int | None) -> int:
    return 10 if steps is None else max(1, min(int(0.005 * steps), 10))


def _when(cfg: Any, kind: str, length: RunLength) -> dict[str, Any]:
    """Return `{kind}_strategy` and `{kind}_steps`; each epoch if nothing is set."""
    steps, per_epoch = getattr(cfg, f"{kind}_steps"), getattr(cfg, f"{kind}s_per_epoch")
    strategy = getattr(cfg, f"{kind}_strategy")
    if steps is not None:
        return {f"{kind}_strategy": "steps", f"{kind}_steps": steps}
    if per_epoch is not None:
        # Below 1: transformers reads 1 as one step.
        fraction = min(1 / (per_epoch * cfg.num_epochs), 1 - 1e-9)
        steps_per_epoch = length.steps_per_epoch
        every = math.ceil(steps_per_epoch / per_epoch) if steps_per_epoch is not None else fraction
        return {f"{kind}_strategy": "steps", f"{kind}_steps": every}
    return {f"{kind}_strategy": strategy or "epoch"}


def _selects(cfg: Any) -> bool:
    return bool(cfg.load_best_model_at_end or cfg.early_stopping_patience or cfg.save_strategy == "best")


def _selection(cfg: Any) -> dict[str, Any]:
    metric = cfg.metric_for_best_model or get_strategy(cfg.rl).best_metric
    greater = cfg.greater_is_better
    return {
        "load_best_model_at_end": bool(cfg.load_best_model_at_end),
        "metric_for_best_model": metric,
        "greater_is_better": not metric.endswith("loss") if greater is None else greater,
    }


def _check_best(arguments: dict[str, Any]) -> None:
    key = "load_best_model_at_end"
    saved, evaluated = arguments["save_strategy"], arguments["eval_strategy"]
    # A checkpoint is then written only after an evaluation, whenever that is.
    if saved == "best":
        return
    if saved != evaluated:
        raise ValueError(
            f"{key}: the best checkpoint needs evaluation and saving at the same steps, "
            f"but evaluation is by {evaluated} and saving by {saved}; set eval_steps and save_steps to the same number"
        )
    save_steps, eval_steps = arguments.get("save_steps"), arguments.get("eval_steps")
    # Fractions of a run are only steps once its length is known; transformers checks those.
    if isinstance(save_steps, int) and isinstance(eval_steps, int) and save_steps % eval_steps != 0:
        raise ValueError(f"{key}: save_steps ({save_steps}) must be a multiple of eval_steps ({eval_steps})")
