"""How many steps a run has, and at which of them it warms up, logs, evaluates, saves and stops."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from strategies.registry import get_strategy

__all__ = ["RunLength", "cadence_arguments", "steps_per_epoch", "total_steps"]


@dataclass(frozen=True)
class RunLength:
    """What is known of a run before it starts; `None` is "not known yet"."""

    total_steps: int | None
    """Optimizer steps of the run, when they are fixed."""
    expected_steps: int | None
    """Optimizer steps of the run as far as they can be told: fixed, or from the number of rows."""
    steps_per_epoch: int | None


def steps_per_epoch(num_rows: int, cfg: Any, world_size: int = 1) -> int:
    """Optimizer steps of one epoch; the last, incomplete global batch is a step too, unless `dataloader_drop_last`."""
    return get_strategy(cfg.rl).steps_per_epoch(num_rows, cfg, world_size)


def total_steps(num_rows: int, cfg: Any, world_size: int = 1) -> int:
    """Optimizer steps of a run over `num_rows` rows: `max_steps` if set, else `num_epochs` epochs."""
    return cfg.max_steps or math.ceil(cfg.num_epochs * steps_per_epoch(num_rows, cfg, world_size))


def cadence_arguments(cfg: Any, length: RunLength) -> dict[str, Any]:
    """Return the arguments of warm-up, logging, evaluation, saving and selection.

    Raises:
        ValueError: when the best checkpoint is asked for and evaluation and saving fall on different steps.
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
        arguments.update(_selection(cfg))
    if cfg.load_best_model_at_end:
        _check_best(arguments)
    return arguments


def _warmup(cfg: Any, steps: int | None) -> float:
    """Steps, or, while the number of steps isn't known, a part of them below 1 (transformers takes both)."""
    if cfg.warmup_steps is not None:
        return cfg.warmup_steps
    if steps is None:
        ratio = 0.03 if cfg.warmup_ratio is None else cfg.warmup_ratio
        return min(ratio, 1 - 1e-9)
    if cfg.warmup_ratio is not None:
        return int(cfg.warmup_ratio * steps)
    return min(int(0.03 * steps), 100)


def _logging_steps(steps: int | None) -> int:
    return 10 if steps is None else max(1, min(int(0.005 * steps), 10))


def _when(cfg: Any, kind: str, length: RunLength) -> dict[str, Any]:
    """`{kind}_strategy` and `{kind}_steps`; each epoch when nothing is set."""
    steps, per_epoch = getattr(cfg, f"{kind}_steps"), getattr(cfg, f"{kind}s_per_epoch")
    strategy = getattr(cfg, f"{kind}_strategy")
    if steps is not None:
        return {f"{kind}_strategy": "steps", f"{kind}_steps": steps}
    if per_epoch is not None:
        part = 1 / (per_epoch * cfg.num_epochs)
        known = length.steps_per_epoch
        every = math.ceil(known / per_epoch) if known is not None else part if part < 1 else 1
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
    if saved == "best":
        return
    if saved != evaluated:
        raise ValueError(
            f"{key}: the best checkpoint needs evaluation and saving at the same steps, "
            f"but evaluation is by {evaluated} and saving by {saved}; set eval_steps and save_steps to the same number"
        )
    save_steps, eval_steps = arguments.get("save_steps"), arguments.get("eval_steps")
    if isinstance(save_steps, int) and isinstance(eval_steps, int) and save_steps % eval_steps != 0:
        raise ValueError(f"{key}: save_steps ({save_steps}) must be a multiple of eval_steps ({eval_steps})")
