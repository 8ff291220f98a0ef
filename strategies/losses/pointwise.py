"""Losses of chosen and rejected separately, functions of the summed log-ratio r of policy and reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from strategies.losses.scores import logratios
from strategies.losses.types import LossOptions, PairLogps

__all__ = ["apo_down_loss", "apo_zero_loss", "bco_pair_loss", "nca_pair_loss"]


def nca_pair_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of noise contrastive alignment on pairs, shape (B,).

    Noise contrastive alignment, arXiv 2402.05369: treats each answer separately, which keeps the likelihood of the chosen one
    up.

    $$
    -\log \sigma(\beta r(y_w)) - \frac{1}{2} \log \sigma(-\beta r(y_w)) - \frac{1}{2} \log \sigma(-\beta r(y_l))
    $$

    The first two terms have their minimum at $\beta r(y_w) = \log 2$: the chosen answer is pulled to that value from both
    sides.
    """
    ratios = logratios(policy, reference)
    chosen, rejected = options.beta * ratios.chosen, options.beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of binary classifier optimisation on pairs, shape (B,).

    Binary classifier optimisation, arXiv 2404.04656, without the paper's running mean of rewards, as in TRL.

    $$
    -\log \sigma(\beta r(y_w)) - \log \sigma(-\beta r(y_l))
    $$
    """
    ratios = logratios(policy, reference)
    return -logsigmoid(options.beta * ratios.chosen) - logsigmoid(-options.beta * ratios.rejected)


def apo_zero_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of APO-zero, shape (B,).

    Anchored preference optimisation, arXiv 2408.06266, equation 7: for chosen answers that are better than the model's. The
    likelihood of the chosen answer goes up, that of the rejected one down.

    $$
    1 - \sigma(\beta r(y_w)) + \sigma(\beta r(y_l))
    $$
    """
    ratios = logratios(policy, reference)
    # sigmoid(-x) for 1 - sigmoid(x), whose digits cancel where the sigmoid is close to 1; below as well.
    return torch.sigmoid(-options.beta * ratios.chosen) + torch.sigmoid(options.beta * ratios.rejected)


def apo_down_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of APO-down, shape (B,).

    Anchored preference optimisation, arXiv 2408.06266, equation 8: for models whose answers are better than both. Both
    likelihoods go down, that of the rejected answer more.

    $$
    \sigma(\beta r(y_w)) + 1 - \sigma(\beta (r(y_w) - r(y_l)))
    $$
    """
    ratios = logratios(policy, reference)
    margins = options.beta * (ratios.chosen - ratios.rejected)
    return torch.sigmoid(options.beta * ratios.chosen) + torch.sigmoid(-margins)
