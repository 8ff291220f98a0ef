"""What an optimizer takes from the config and not from a checkpoint: learning rates, weight decay, Adam's constants.

A run that goes on from its own checkpoint has the same in both. One that goes on from another run's, as population based
training does, keeps the moments and the place in the schedule, and trains on with its own settings.
"""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

__all__ = ["apply_settings", "settings_of"]

OPTIONS = ("weight_decay", "betas", "eps")
RATES = ("initial_lr", "max_lr", "min_lr")
"""Learning rates that a schedule is made of; `lr` is what has become of them at a step."""


def settings_of(scheduler: LRScheduler) -> list[dict[str, Any]]:
    """Settings of each group of the schedule's optimizer, before a checkpoint is loaded into them."""
    swings = isinstance(scheduler, OneCycleLR) and scheduler.cycle_momentum
    options = [name for name in (*OPTIONS, *RATES) if not (swings and name == "betas")]
    return [{name: group[name] for name in options if name in group} for group in scheduler.optimizer.param_groups]


def apply_settings(scheduler: LRScheduler, settings: list[dict[str, Any]]) -> None:
    """Put settings back after a checkpoint was loaded; what the schedule has made of a learning rate is scaled along."""
    groups = scheduler.optimizer.param_groups
    for group, wanted in zip(groups, settings, strict=True):
        stored = group.get("initial_lr")
        group.update(wanted)
        if stored and stored != wanted["initial_lr"]:
            group["lr"] *= wanted["initial_lr"] / stored
    if not isinstance(scheduler, ReduceLROnPlateau):  # it has no rates but those of the groups
        scheduler.base_lrs = [group["initial_lr"] for group in groups]
        scheduler._last_lr = [group["lr"] for group in groups]
