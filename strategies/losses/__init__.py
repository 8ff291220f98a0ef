"""Losses: pure functions of log-probabilities. Pair losses have TRL's names.

table.py      all pair losses, with paper and options
logistic.py, regression.py, pointwise.py, transport.py, reference_free.py  the functions, by family
kto.py        KTO's loss, of single completions
scores.py     f-divergences
types.py      inputs and options of a loss

What follows the first paragraph of a pair loss's docstring is its section of docs/strategies.md, as Markdown with formulas in
TeX (`python -m docs._ext.loss_sections` copies it there). y_w is the chosen and y_l the rejected completion, r(y) the summed
log-ratio of policy and reference, h(y) its score under `f_divergence` (r(y) itself for reverse_kl), Delta = h(y_w) - h(y_l),
|y| a length in tokens, beta and varepsilon are `options.beta` and `options.label_smoothing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.losses.kto import kl_estimate, kto_loss
    from strategies.losses.reference_free import nll
    from strategies.losses.scores import F_DIVERGENCES
    from strategies.losses.table import PAIR_LOSSES
    from strategies.losses.types import LossOptions, PairLogps, PairLoss, averaged
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.losses.kto": "kl_estimate kto_loss",
            "strategies.losses.reference_free": "nll",
            "strategies.losses.scores": "F_DIVERGENCES",
            "strategies.losses.table": "PAIR_LOSSES",
            "strategies.losses.types": "LossOptions PairLogps PairLoss averaged",
        },
    )

__all__ = ["F_DIVERGENCES", "LossOptions", "PAIR_LOSSES", "PairLogps", "PairLoss", "averaged", "kl_estimate", "kto_loss", "nll"]
