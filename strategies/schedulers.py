"""Learning-rate schedules as pure functions of the step: each returns the multiple of the peak learning rate.

`step` counts optimizer steps from 0; `total` is their number in the run; `warmup` of them raise the rate linearly.
"""

from __future__ import annotations

import math

__all__ = ["cosine_with_floor", "rex", "warmup_fraction"]


def warmup_fraction(step: int, warmup: int) -> float | None:
    """`step / warmup` while warming up, None afterwards."""
    return step / warmup if step < warmup else None


def cosine_with_floor(step: int, *, warmup: int, total: int, floor: float, end: float = 1.0) -> float:
    """Half a cosine from 1 down to `floor`, reached at step `end * total` and kept from there on.

        p = (step - warmup) / (end * total - warmup), at most 1
        floor + (1 - floor) * (1 + cos(pi * p)) / 2

    Args:
        floor: the lowest multiple, in [0, 1] (`cosine_min_lr_ratio`).
        end: the part of the run after which the rate stays constant, in (0, 1] (`cosine_constant_lr_ratio`).
    """
    warming = warmup_fraction(step, warmup)
    if warming is not None:
        return warming
    progress = _progress(step, warmup, end * total)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def rex(step: int, *, warmup: int, total: int, floor: float = 0.0) -> float:
    """Reflected exponential (arXiv 2107.04197, equation 2): falls slowly first, fast at the end.

    p = (step - warmup) / (total - warmup), at most 1
    floor + (1 - floor) * (1 - p) / (1 - p / 2)
    """
    warming = warmup_fraction(step, warmup)
    if warming is not None:
        return warming
    progress = _progress(step, warmup, total)
    return floor + (1 - floor) * (1 - progress) / (1 - progress / 2)


def _progress(step: int, warmup: int, end: float) -> float:
    """How far `step` is between `warmup` and `end`, in [0, 1]; 1 when the warm-up reaches the end."""
    return min(1.0, (step - warmup) / (end - warmup)) if end > warmup else 1.0
