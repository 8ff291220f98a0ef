"""Alignment by optimal transport: losses of sorted batches, arXiv 2406.05882.

Both compare distributions over the B pairs of a call, so a pair's loss depends on the others, and calls on parts of a batch
sort each part separately. Element i of the result belongs to rank i, not to pair i: weights per pair do not apply to it.
"""

from __future__ import annotations

from torch import Tensor

from strategies.losses.logistic import smoothed_logistic
from strategies.losses.scores import logratios
from strategies.losses.types import LossOptions, PairLogps

__all__ = ["aot_loss", "aot_unpaired_loss"]


def aot_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of paired AOT, shape (B,), in the order of the sorted margins.

    Alignment by optimal transport, arXiv 2406.05882: compares the sorted margins of a global batch between policy and
    reference. $m_\theta$ and $m_{\mathrm{ref}}$ are the differences of the log-probabilities of $y_w$ and $y_l$, $m_{(i)}$
    the $i$-th smallest.

    $$
    d_i = m_{\theta (i)} - m_{\mathrm{ref} (i)}, \qquad
    -(1 - \varepsilon) \log \sigma(\beta d_i) - \varepsilon \log \sigma(-\beta d_i)
    $$

    For one pair it equals `sigmoid`.
    """
    assert reference is not None, "aot compares the policy with a reference"
    # Each side is sorted by itself, so rank i may be two different pairs; the gradient reaches the policy's one.
    policy_margins = (policy.chosen - policy.rejected).sort().values
    reference_margins = (reference.chosen - reference.rejected).sort().values
    return smoothed_logistic(options.beta * (policy_margins - reference_margins), options.label_smoothing)


def aot_unpaired_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of unpaired AOT, shape (B,), in the order of the sorted log-ratios.

    `aot` for log-ratios, arXiv 2406.05882: sorted log-ratios of chosen answers against those of rejected ones, independent of
    the pairing.

    $$
    d_i = r(y_w)_{(i)} - r(y_l)_{(i)}, \qquad
    -(1 - \varepsilon) \log \sigma(\beta d_i) - \varepsilon \log \sigma(-\beta d_i)
    $$

    For one pair it equals `sigmoid`.
    """
    # The quantiles of both groups are matched: first-order dominance of chosen over rejected.
    ratios = logratios(policy, reference)
    differences = ratios.chosen.sort().values - ratios.rejected.sort().values
    return smoothed_logistic(options.beta * differences, options.label_smoothing)
