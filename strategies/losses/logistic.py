"""Losses of the logistic family: functions of sigmoid(beta * (score of chosen - score of rejected))."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from strategies.losses.scores import scores
from strategies.losses.types import LossOptions, PairLogps, averaged

__all__ = [
    "discopop_loss",
    "exo_pair_loss",
    "robust_loss",
    "sigmoid_loss",
    "sigmoid_norm_loss",
    "smoothed_logistic",
]


def smoothed_logistic(margins: Tensor, label_smoothing: float) -> Tensor:
    """Return -(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x), shape of `margins`."""
    # The other form would be nan at an infinite margin, where it multiplies infinity by 0.
    if label_smoothing == 0:
        return -logsigmoid(margins)
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def sigmoid_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the negative log-likelihood of the preferences, shape (B,).

    The default: DPO, arXiv 2305.18290, equation 7.

    $$
    -(1 - \varepsilon) \log \sigma(\beta \Delta) - \varepsilon \log \sigma(-\beta \Delta)
    $$

    With $\varepsilon > 0$ it is [conservative DPO](https://ericmitchell.ai/cdpo.pdf), equation 3, for labels that are wrong
    with probability $\varepsilon$: margins beyond $\log((1 - \varepsilon)/\varepsilon)$ are penalised. TRL ignores label
    smoothing here.
    """
    return smoothed_logistic(_margins(scores(policy, reference, options), options), options.label_smoothing)


def sigmoid_norm_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of length-normalised DPO, shape (B,).

    Length-normalised DPO, Tulu 3, arXiv 2411.15124: for data whose chosen answers are longer. Its $\beta$ is about 50 times
    that of `sigmoid` (Tulu 3 uses 5).

    $$
    -\log \sigma\left(\beta \left(\frac{h(y_w)}{\lvert y_w \rvert} - \frac{h(y_l)}{\lvert y_l \rvert}\right)\right)
    $$

    Under an f-divergence $h$ is computed from the summed log-ratio and divided afterwards, as in TRL.
    """
    # `averaged` of the scores: a score is not linear in the log-ratio, so that the order matters.
    return -logsigmoid(_margins(averaged(scores(policy, reference, options)), options))


def robust_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of robust DPO, shape (B,), for a label smoothing in [0, 1/2).

    Robust DPO, arXiv 2403.00409: its expectation over labels flipped with probability $\varepsilon$ is DPO on clean labels.
    It falls with the margin everywhere and has no lower bound; `sigmoid` with the same $\varepsilon$ is the conservative
    variant.

    $$
    \frac{-(1 - \varepsilon) \log \sigma(\beta \Delta) + \varepsilon \log \sigma(-\beta \Delta)}{1 - 2 \varepsilon}
    $$
    """
    eps = options.label_smoothing
    assert 0 <= eps < 0.5, f"robust needs a label_smoothing in [0, 0.5), got {eps}"
    margins = _margins(scores(policy, reference, options), options)
    # The second term has the opposite sign of `smoothed_logistic`'s; that makes the estimate unbiased, and the loss unbounded.
    return (-(1 - eps) * logsigmoid(margins) + eps * logsigmoid(-margins)) / (1 - 2 * eps)


def exo_pair_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of EXO on pairs, shape (B,), for a label smoothing in (0, 1).

    EXO, arXiv 2402.00856, equation 16, for two answers: the reverse divergence between the labels and the policy. It needs
    `dpo_label_smoothing` above 0; the paper uses 0.001. With $q = \sigma(\beta \Delta)$:

    $$
    q \left(\log q - \log(1 - \varepsilon)\right) + (1 - q) \left(\log(1 - q) - \log \varepsilon\right)
    $$

    It is 0 at $\beta \Delta = \log((1 - \varepsilon)/\varepsilon)$, approaches $-\log(1 - \varepsilon)$ above and
    $-\log \varepsilon$ below, so it is not monotone in the margin.
    """
    eps = options.label_smoothing
    assert 0 < eps < 1, f"exo_pair needs a label_smoothing in (0, 1), got {eps}"
    margins = _margins(scores(policy, reference, options), options)
    # KL(policy || labels) of a choice between two. By logsigmoid, whose value stays finite where log(sigmoid(x)) is log(0).
    right = torch.sigmoid(margins) * (logsigmoid(margins) - math.log1p(-eps))
    wrong = torch.sigmoid(-margins) * (logsigmoid(-margins) - math.log(eps))
    return right + wrong


def discopop_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return DiscoPOP's log-ratio modulated loss, shape (B,).

    A loss discovered by a language model, arXiv 2406.08414, equation 5: a blend of logistic and exponential loss, weighted by
    $m = \sigma(\beta \Delta / \tau)$, where $\tau$ is `dpo_discopop_tau` (0.05).

    $$
    -(1 - m) \log \sigma(\beta \Delta) + m \exp(-\beta \Delta)
    $$
    """
    margins = _margins(scores(policy, reference, options), options)
    modulation = margins / options.discopop_tau
    # exp(-x) alone overflows for large negative x while m vanishes. The clamp can act for tau > 1 only, where x < -60.
    exponential = torch.exp((logsigmoid(modulation) - margins).clamp(max=60.0))
    return -logsigmoid(margins) * torch.sigmoid(-modulation) + exponential


def _margins(values: PairLogps, options: LossOptions) -> Tensor:
    return options.beta * (values.chosen - values.rejected)
