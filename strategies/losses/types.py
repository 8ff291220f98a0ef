"""What a pairwise loss reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["LossOptions", "PairLoss", "PairLogps"]


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities (nats) of B pairs under one policy, summed over the completion, and lengths in tokens.

    Every tensor has shape (B,).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


@dataclass(frozen=True)
class LossOptions:
    """Numbers that parametrise the losses."""

    beta: float = 0.1
    label_smoothing: float = 0.0


PairLoss = Callable[[PairLogps, PairLogps | None, LossOptions], Tensor]
"""(policy, reference, options) -> loss of each pair, shape (B,), to be minimised."""
