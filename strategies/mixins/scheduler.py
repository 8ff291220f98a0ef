"""Learning-rate schedules that transformers doesn't have."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers import Trainer

__all__ = ["SchedulerMixin", "cosine_with_floor", "rex", "warmup_fraction"]

SHORTEST = 1e-6
"""Of a step: the length of a phase that has a single one."""


def warmup_fraction(step: int, warmup: int) -> float | None:
    """Return `step / warmup` during warm-up, None afterwards."""
    return step / warmup if step < warmup else None


def cosine_with_floor(step: int, *, warmup: int, total: int, floor: float, end: float = 1.0) -> float:
    """Return half a cosine from 1 down to `floor`, reached at step `end * total` and constant afterwards.

        p = (step - warmup) / (end * total - warmup), at most 1
        floor + (1 - floor) * (1 + cos(pi * p)) / 2

    Args:
        floor: the lowest multiple, in [0, 1] (`cosine_min_lr_ratio`).
        end: the fraction of the run after which the rate stays constant, in (0, 1] (`cosine_constant_lr_ratio`).
    """
    warming = warmup_fraction(step, warmup)
    if warming is not None:
        return warming
    progress = _progress(step, warmup, end * total)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def rex(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Return the reflected exponential (arXiv 2107.04197, equation 2), which falls slowly first and fast at the end.

    p = (step - warmup) / (total - warmup), at most 1
    floor + (1 - floor) * (1 - p) / (1 - p / 2)
    """
    warming = warmup_fraction(step, warmup)
    if warming is not None:
        return warming
    progress = _progress(step, warmup, total)
    return floor + (1 - floor) * (1 - progress) / (1 - progress / 2)


def _progress(step: int, warmup: int, end: float) -> float:
    """Return the progress of `step` from `warmup` to `end`, in [0, 1]; 1 if the warm-up reaches the end."""
    return min(1.0, (step - warmup) / (end - warmup)) if end > warmup else 1.0


class SchedulerMixin(Trainer):
    """Adds rex, one_cycle and the cosine with a floor; everything else is transformers' own."""

    lr_scheduler: LRScheduler | None

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule once; an existing scheduler (DeepSpeed's, the caller's) stays.

        Raises:
            ValueError: for `lr_scheduler_kwargs` that the schedule doesn't accept.
        """
        optimizer = optimizer if optimizer is not None else self.optimizer
        if self.lr_scheduler is None:
            scheduler = self._custom_scheduler(num_training_steps, optimizer)
            if scheduler is not None:
                self.lr_scheduler = scheduler
                # Else `_prepare_for_training` would keep this schedule in a second `train`, at its end.
                self._created_lr_scheduler = True
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        # Those that go by metrics don't note it; a checkpoint has it, so that a run resumed with another rate can scale.
        for group in optimizer.param_groups if optimizer is not None else ():
            group.setdefault("initial_lr", group["lr"])
        return scheduler

    def _custom_scheduler(self, total: int, optimizer: Optimizer | None) -> LRScheduler | None:
        args = self.args
        # transformers' `lr_scheduler_type` is an enum, without rex and one_cycle.
        kind = args.alternate_lr_scheduler_type or str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        assert optimizer is not None, "the optimizer is created before the scheduler"
        warmup, floor = args.get_warmup_steps(total), args.cosine_min_lr_ratio
        if kind == "one_cycle":
            return _one_cycle(optimizer, warmup, total, args.lr_scheduler_kwargs or {})
        if kind == "rex":
            return LambdaLR(optimizer, partial(rex, warmup=warmup, total=total, floor=floor or 0.0))
        if kind == "cosine" and floor is not None:
            end = 1.0 if args.cosine_constant_lr_ratio is None else args.cosine_constant_lr_ratio
            return LambdaLR(optimizer, partial(cosine_with_floor, warmup=warmup, total=total, floor=floor, end=end))
        return None


def _one_cycle(optimizer: Optimizer, warmup: int, total: int, kwargs: dict[str, Any]) -> OneCycleLR:
    """Return the one-cycle schedule (arXiv 1708.07120): warm-up, then decay, each parameter group with its own peak rate.

    torch would also cycle Adam's beta1 between 0.85 and 0.95; here it stays constant unless `lr_scheduler_kwargs` sets
    `cycle_momentum`.
    """
    total = max(total, 1)
    # torch divides by the length of each phase, and its first ends a step early: one of a single step would have none, and one
    # of all steps would leave none for the second.
    steps = min(warmup, total - 1)
    first = 1 + SHORTEST if steps == 1 else steps
    options = {"pct_start": min(1.0, first / total), "anneal_strategy": "cos", "cycle_momentum": False, **kwargs}
    # Before the constructor replaces them by the rates of the first step.
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=math.ceil(total), **options)
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs: one_cycle doesn't take these: {error}") from error
