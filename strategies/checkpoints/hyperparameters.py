"""Hyperparameters that an optimizer takes from the config instead of a checkpoint: learning rates, weight decay, betas, eps.

They are the same in both if a run resumes from its own checkpoint. A run that resumes from another run's checkpoint, as in
population-based training, keeps the moments and the position in the schedule, and continues with its own hyperparameters. So
does a run that is extended: its next step has the rate of the longer schedule.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from transformers import GreedyLR

from strategies.compat import set_last_rates

__all__ = ["Hyperparameters", "apply_hyperparameters", "read_hyperparameters"]

OPTIONS = ("weight_decay", "betas", "eps")
RATES = ("initial_lr", "max_lr", "min_lr")
"""Parameters of a schedule, from which `lr` is computed at each step."""
LENGTH = ("total_steps", "_schedule_phases")
"""Length of the schedule as `OneCycleLR` stores it; other schedules have it in functions, which are not saved."""


@dataclass(frozen=True)
class Hyperparameters:
    """Values of each parameter group of an optimizer, and of the schedule itself."""

    groups: list[dict[str, Any]]
    schedule: dict[str, Any]


def read_hyperparameters(scheduler: LRScheduler) -> Hyperparameters:
    """Return those of a schedule and its optimizer, before a checkpoint is loaded into them."""
    # Then betas are the schedule's value at its step, which the checkpoint has, and not the config's.
    cycles_momentum = isinstance(scheduler, OneCycleLR) and scheduler.cycle_momentum
    options = [name for name in (*OPTIONS, *RATES) if not (cycles_momentum and name == "betas")]
    groups = [{name: group[name] for name in options if name in group} for group in scheduler.optimizer.param_groups]
    return Hyperparameters(groups, {name: getattr(scheduler, name) for name in LENGTH if hasattr(scheduler, name)})


def apply_hyperparameters(scheduler: LRScheduler, hyperparameters: Hyperparameters) -> None:
    """Restore them after a checkpoint was loaded, and set the learning rates of the next step accordingly."""
    groups = scheduler.optimizer.param_groups
    for group, values in zip(groups, hyperparameters.groups, strict=True):
        stored = group.get("initial_lr")
        group.update(values)
        # For schedules that `_rates` can't compute, such as those that go by metrics: their current rate, as a multiple.
        if stored and stored != values["initial_lr"]:
            group["lr"] *= values["initial_lr"] / stored
    vars(scheduler).update(hyperparameters.schedule)
    if not isinstance(scheduler, (ReduceLROnPlateau, GreedyLR)):  # whose rates depend on past metrics, and stand in the groups
        # `load_state_dict` has set those of the checkpoint, which every later step would start from.
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, _rates(scheduler), strict=True):
            group["lr"] = rate
    # Saved with the schedule; one that goes by metrics writes them into the groups when it is loaded.
    set_last_rates(scheduler, [group["lr"] for group in groups])


def _rates(scheduler: LRScheduler) -> list[Any]:
    """Return the next step's learning rates if the schedule depends on the step alone; else the current ones."""
    if isinstance(scheduler, LambdaLR):
        # Not `get_lr`, by which torch warns when it is called outside of `step`.
        multiples = [multiple(scheduler.last_epoch) for multiple in scheduler.lr_lambdas]
        return [base * multiple for base, multiple in zip(scheduler.base_lrs, multiples, strict=True)]
    if isinstance(scheduler, OneCycleLR) and scheduler.last_epoch < scheduler.total_steps:
        with warnings.catch_warnings(action="ignore"):  # torch warns outside of `step`
            return list(scheduler.get_lr())
    return [group["lr"] for group in scheduler.optimizer.param_groups]
