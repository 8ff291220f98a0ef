"""Losses that regress log-ratios to a target: hinge, IPO, SPPO."""

from __future__ import annotations

import torch
from torch import Tensor

from strategies.losses.scores import logratios, scores
from strategies.losses.types import LossOptions, PairLogps, averaged

__all__ = ["hinge_loss", "ipo_loss", "sppo_hard_loss"]


def hinge_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the hinge loss of the margin, shape (B,).

    SLiC, arXiv 2305.10425, with log-ratios, as in RSO, arXiv 2309.06657: pairs beyond a margin of $1/\beta$ have no gradient.

    $$
    \max(0, 1 - \beta \Delta)
    $$
    """
    values = scores(policy, reference, options)
    # RSO's margin, 1 for beta * Delta; SLiC's own, delta, is one of log-probabilities without beta.
    return torch.relu(1 - options.beta * (values.chosen - values.rejected))


def ipo_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the squared distance of the margin from its target, shape (B,).

    IPO, arXiv 2310.12036, equation 17: the margin has a target, so pairs with deterministic labels don't push the policy
    without bound.

    $$
    \left(\frac{h(y_w)}{\lvert y_w \rvert} - \frac{h(y_l)}{\lvert y_l \rvert} - \frac{1}{2 \beta}\right)^2
    $$

    Log-ratios are averaged over tokens, as in TRL and HALOs; the paper, where $\beta$ is called $\tau$, and Mitchell's code
    sum them, so their values aren't comparable. Under an f-divergence $h$ is computed from the summed log-ratio and divided
    afterwards, as in TRL. `rl: ipo` is this loss alone.
    """
    values = averaged(scores(policy, reference, options))
    # Divided by lengths, the margin is per token, and so is the target.
    return (values.chosen - values.rejected - 1 / (2 * options.beta)) ** 2


def sppo_hard_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of SPPO with hard labels, shape (B,).

    Self-play preference optimisation, arXiv 2405.00675, with a win probability of 1 for the chosen answer, as in TRL: both
    log-ratios have a target. The paper's $\eta$ is $1/\beta$.

    $$
    \left(r(y_w) - \frac{1}{2 \beta}\right)^2 + \left(r(y_l) + \frac{1}{2 \beta}\right)^2
    $$
    """
    ratios = logratios(policy, reference)
    target = 1 / (2 * options.beta)
    return (ratios.chosen - target) ** 2 + (ratios.rejected + target) ** 2
