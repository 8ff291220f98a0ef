"""What an optimizer takes from the config and not from a checkpoint: learning rates, weight decay, Adam's constants.

A run that goes on from its own checkpoint has the same in both. One that goes on from another run's, as population based
training does, keeps the moments and the place in the schedule, and trains on with its own settings. So does one that goes on
for longer: the next step has the rate that the longer schedule gives it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

__all__ = ["Settings", "apply_settings", "settings_of"]

OPTIONS = ("weight_decay", "betas", "eps")
RATES = ("initial_lr", "max_lr", "min_lr")
"""Learning rates that a schedule is made of; `lr` is what has become of them at a step."""
LENGTH = ("total_steps", "_schedule_phases")
"""What `OneCycleLR` keeps of its length; other schedules have it in functions, which no checkpoint holds."""


@dataclass(frozen=True)
class Settings:
    """Of each group of an optimizer, and of the schedule itself."""

    groups: list[dict[str, Any]]
    schedule: dict[str, Any]


def settings_of(scheduler: LRScheduler) -> Settings:
    """Settings of a schedule and of each group of its optimizer, before a checkpoint is loaded into them."""
    swings = isinstance(scheduler, OneCycleLR) and scheduler.cycle_momentum
    options = [name for name in (*OPTIONS, *RATES) if not (swings and name == "betas")]
    groups = [{name: group[name] for name in options if name in group} for group in scheduler.optimizer.param_groups]
    return Settings(groups, {name: getattr(scheduler, name) for name in LENGTH if hasattr(scheduler, name)})


def apply_settings(scheduler: LRScheduler, settings: Settings) -> None:
    """Put settings back after a checkpoint was loaded; learning rates become those of the next step under them."""
    groups = scheduler.optimizer.param_groups
    for group, wanted in zip(groups, settings.groups, strict=True):
        stored = group.get("initial_lr")
        group.update(wanted)
        if stored and stored != wanted["initial_lr"]:
            group["lr"] *= wanted["initial_lr"] / stored
    vars(scheduler).update(settings.schedule)
    if not isinstance(scheduler, ReduceLROnPlateau):  # it has no rates but those of the groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        for group, rate in zip(groups, _rates(scheduler), strict=True):
            group["lr"] = rate
        scheduler._last_lr = [group["lr"] for group in groups]


def _rates(scheduler: LRScheduler) -> list[Any]:
    """The learning rates of the next step, where the schedule says them by the step alone; else those that there are."""
    if isinstance(scheduler, LambdaLR):
        multiples = [multiple(scheduler.last_epoch) for multiple in scheduler.lr_lambdas]
        return [base * multiple for base, multiple in zip(scheduler.base_lrs, multiples, strict=True)]
    if isinstance(scheduler, OneCycleLR) and scheduler.last_epoch < scheduler.total_steps:
        with warnings.catch_warnings(action="ignore"):  # torch would have this asked within `step` only
            return list(scheduler.get_lr())
    return [group["lr"] for group in scheduler.optimizer.param_groups]
