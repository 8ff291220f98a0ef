"""What each loss of pairs reads. Loads without torch; tests hold it to the behaviour of `strategies.losses.PAIR_LOSSES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from strategies.losses import PairLoss

__all__ = ["F_DIVERGENCES", "LOSSES", "OUTSIDE_LOSSES", "LossTraits", "loss_types"]

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class LossTraits:
    """What changes the value of one loss.

    `reads` names the fields of `strategies.losses.LossOptions` that do (alpha belongs to f_divergence). `reference`:
    whether log-probabilities of a reference are needed. `couples`: whether the loss of a pair depends on other pairs of
    the batch. `lengths`: whether the loss averages over completion tokens itself. `strategy`: whether it is the loss of a
    strategy of its own, and so none of `dpo_loss_type`.
    """

    reads: frozenset[str]
    reference: bool = True
    couples: bool = False
    lengths: bool = False
    strategy: bool = False


def _reads(names: str) -> frozenset[str]:
    return frozenset(names.split())


LOSSES: dict[str, LossTraits] = {
    "sigmoid": LossTraits(_reads("beta label_smoothing f_divergence")),
    "hinge": LossTraits(_reads("beta f_divergence")),
    "ipo": LossTraits(_reads("beta f_divergence"), lengths=True),
    "exo_pair": LossTraits(_reads("beta label_smoothing f_divergence")),
    "nca_pair": LossTraits(_reads("beta")),
    "robust": LossTraits(_reads("beta label_smoothing f_divergence")),
    "bco_pair": LossTraits(_reads("beta")),
    "sppo_hard": LossTraits(_reads("beta")),
    "aot": LossTraits(_reads("beta label_smoothing"), couples=True),
    "aot_unpaired": LossTraits(_reads("beta label_smoothing"), couples=True),
    "apo_zero": LossTraits(_reads("beta")),
    "apo_down": LossTraits(_reads("beta")),
    "discopop": LossTraits(_reads("beta f_divergence discopop_tau")),
    "sft": LossTraits(_reads(""), reference=False, couples=True, lengths=True),
    "sigmoid_norm": LossTraits(_reads("beta f_divergence"), lengths=True),
    "simpo": LossTraits(_reads("beta label_smoothing gamma"), reference=False, lengths=True, strategy=True),
    "orpo": LossTraits(_reads("beta"), reference=False, lengths=True, strategy=True),
}
"""Name -> traits; `strategies.registering.register_loss` adds others."""
OUTSIDE_LOSSES: dict[str, PairLoss] = {}
"""Name -> loss that was registered; `strategies.losses.PAIR_LOSSES` has them too."""


def loss_types() -> tuple[str, ...]:
    """Values of `dpo_loss_type`, by TRL's names."""
    return tuple(name for name, traits in LOSSES.items() if not traits.strategy)
