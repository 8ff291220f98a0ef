"""Losses: pure functions of log-probabilities. Those of pairs go by TRL's names."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import MutableMapping

from strategies.loss_traits import OUTSIDE_LOSSES
from strategies.losses.kto import kl_estimate, kto_loss
from strategies.losses.logistic import discopop_loss, exo_pair_loss, robust_loss, sigmoid_loss, sigmoid_norm_loss
from strategies.losses.pointwise import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_pair_loss
from strategies.losses.reference_free import nll, orpo_loss, sft_loss, simpo_loss
from strategies.losses.regression import hinge_loss, ipo_loss, sppo_hard_loss
from strategies.losses.scores import F_DIVERGENCES
from strategies.losses.transport import aot_loss, aot_unpaired_loss
from strategies.losses.types import LossOptions, PairLogps, PairLoss, averaged

__all__ = [
    "F_DIVERGENCES",
    "PAIR_LOSSES",
    "LossOptions",
    "PairLogps",
    "PairLoss",
    "averaged",
    "kl_estimate",
    "kto_loss",
    "nll",
]

_OURS: dict[str, PairLoss] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "robust": robust_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "sft": sft_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
PAIR_LOSSES: MutableMapping[str, PairLoss] = ChainMap(OUTSIDE_LOSSES, _OURS)
"""Name -> loss of pairs, also from outside. `strategies.loss_traits.LOSSES` says, without torch, what each one reads."""
