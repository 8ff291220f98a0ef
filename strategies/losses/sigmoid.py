"""The loss of DPO, and its conservative form for noisy labels."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from strategies.losses.types import LossOptions, PairLogps

__all__ = ["sigmoid_loss"]


def sigmoid_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    """Negative log-likelihood of the preferences, shape (B,).

    With x = beta * ((policy - reference) of chosen - (policy - reference) of rejected) and eps = label_smoothing:

        -(1 - eps) * logsigmoid(x) - eps * logsigmoid(-x)

    eps = 0 is DPO, arXiv 2305.18290, equation 7. eps > 0 is conservative DPO, https://ericmitchell.ai/cdpo.pdf,
    equation 3: eps is the probability that a label is wrong, and the optimum lies at x = ln((1 - eps) / eps). TRL 1.16
    ignores label smoothing here.
    """
    assert reference is not None, "sigmoid compares the policy with a reference"
    chosen_logratios = policy.chosen - reference.chosen
    rejected_logratios = policy.rejected - reference.rejected
    margins = options.beta * (chosen_logratios - rejected_logratios)
    eps = options.label_smoothing
    if eps == 0:
        return -logsigmoid(margins)
    return -(1 - eps) * logsigmoid(margins) - eps * logsigmoid(-margins)
