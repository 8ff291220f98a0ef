"""The learning-rate schedules that transformers doesn't have."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers import Trainer

from strategies.schedulers import cosine_with_floor, rex

__all__ = ["SchedulerMixin"]


class SchedulerMixin(Trainer):
    """Adds rex, one_cycle and the cosine with a floor; everything else is transformers' own."""

    lr_scheduler: LRScheduler | None

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule once; a scheduler that is already there (DeepSpeed's, the caller's) stays.

        Raises:
            ValueError: for `lr_scheduler_kwargs` that the schedule doesn't take.
        """
        optimizer = optimizer if optimizer is not None else self.optimizer
        if self.lr_scheduler is None:
            scheduler = self._own_scheduler(num_training_steps, optimizer)
            if scheduler is not None:
                self.lr_scheduler = scheduler
                self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _own_scheduler(self, total: int, optimizer: Optimizer | None) -> LRScheduler | None:
        args = self.args
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
    """Up for the warm-up, then down (arXiv 1708.07120), each parameter group from and to its own learning rate.

    torch would also swing Adam's beta1 between 0.85 and 0.95; here it stays what the config says unless
    `lr_scheduler_kwargs` asks for `cycle_momentum`.
    """
    total = max(total, 1)
    given = {"pct_start": min(1.0, warmup / total), "anneal_strategy": "cos", "cycle_momentum": False, **kwargs}
    peaks = [group["lr"] for group in optimizer.param_groups]
    try:
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=math.ceil(total), **given)
    except TypeError as error:
        raise ValueError(f"lr_scheduler_kwargs: one_cycle doesn't take these: {error}") from error
