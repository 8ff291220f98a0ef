"""Losses of pairs: pure functions of log-probabilities, by TRL's names."""

from __future__ import annotations

from strategies.losses.sigmoid import sigmoid_loss
from strategies.losses.types import LossOptions, PairLogps, PairLoss

__all__ = ["PAIR_LOSSES", "LossOptions", "PairLogps", "PairLoss"]

PAIR_LOSSES: dict[str, PairLoss] = {"sigmoid": sigmoid_loss}
"""Value of `dpo_loss_type` -> loss. A loss that is not here is computed by TRL."""
