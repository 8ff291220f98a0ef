"""Inputs and options of a pair loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["LossOptions", "PairLoss", "PairLogps", "averaged"]


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
    """Parameters of the losses; `strategies.losses.table` lists which loss reads which.

    `beta` is the strength of each loss, in the sense of its docstring. `label_smoothing` is the probability that a label
    is wrong. `f_divergence` is a name of `F_DIVERGENCES`, and `alpha` is read by alpha_divergence alone. `gamma` is
    SimPO's target margin. `discopop_tau` is the temperature of DiscoPOP's mixture. `own` holds the options that have no field:
    those of keys (`key(option=...)`), and of an external strategy's argument `loss_options`. Only what is set is there, so a
    loss reads `options.own.get(name, default)`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence: str = "reverse_kl"
    alpha: float = 0.5
    gamma: float = 0.5
    discopop_tau: float = 0.05
    own: Mapping[str, Any] = field(default_factory=dict)


PairLoss = Callable[[PairLogps, PairLogps | None, LossOptions], Tensor]
"""(policy, reference, options) -> loss of each pair, shape (B,), to be minimised."""


def averaged(logps: PairLogps) -> PairLogps:
    """Return log-probabilities per completion token, shapes (B,): sums divided by lengths, lengths unchanged.

    An empty completion counts as one token, so that its average is its sum, 0.
    """
    return PairLogps(
        logps.chosen / logps.chosen_lengths.clamp(min=1),
        logps.rejected / logps.rejected_lengths.clamp(min=1),
        logps.chosen_lengths,
        logps.rejected_lengths,
    )
