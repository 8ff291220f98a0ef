"""`offset`: DPO's loss with an offset, by which the reward of the chosen completion should lead."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from strategies import register_loss
from strategies.losses import LossOptions, PairLogps


@register_loss("offset", reads=["beta"])
def offset_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    """-logsigmoid(beta * (log-ratio of chosen - log-ratio of rejected) - offset), shape (B,).

    arXiv 2402.10571, equation 4, with one offset for all pairs; 0 is DPO.
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return -logsigmoid(options.beta * (chosen - rejected) - options.own.get("offset", 0.0))
