"""KTO: a loss of single completions that are labelled desirable or undesirable, arXiv 2402.01306."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_estimate", "kto_loss"]


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    labels: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of each completion, shape (B,).

    With r = policy - reference, log-probabilities summed over the completion, and z0 = `kl`:

        desirable:   desirable_weight   * (1 - sigmoid(beta * (r - z0)))
        undesirable: undesirable_weight * (1 - sigmoid(beta * (z0 - r)))

    arXiv 2402.01306, where the weights are called lambda_D and lambda_U. `policy`, `reference`, and `labels` (true for
    desirable) have shape (B,); `kl` is a scalar >= 0, the reference point, and no gradient flows through it. Convention:
    beta multiplies z0 as well, as in TRL.
    """
    desirable = labels.bool()
    gains = beta * (policy - reference - kl.detach())
    # 1 - sigmoid(x) as sigmoid(-x), which keeps its digits where it is close to 0. The gains of undesirable completions are
    # negated: sigmoid(beta * (z0 - r)) of the formula is sigmoid(-gains).
    losses = torch.sigmoid(torch.where(desirable, -gains, gains))
    return torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)


def kl_estimate(policy_kl: Tensor, reference_kl: Tensor) -> Tensor:
    """Return the reference point z0 of `kto_loss`, a scalar without gradient: max(0, mean(policy_kl - reference_kl)).

    The arguments, shapes (N,), are summed log-probabilities of mismatched completions: the paper's estimate of
    KL(policy || reference) pairs prompts with the completions of other rows of the batch. The mean is over these N
    completions; several workers average the differences before clamping.
    """
    # Clamped, since an estimate may be negative, and a divergence isn't.
    return (policy_kl - reference_kl).mean().clamp(min=0).detach()
