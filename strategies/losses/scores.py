"""Log-ratios of policy and reference per completion, and their scores under an f-divergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from strategies.losses.types import LossOptions, PairLogps

__all__ = ["F_DIVERGENCES", "LARGEST_EXPONENT", "logratios", "scores"]

LARGEST_EXPONENT = 30.0
"""Exponent above which exp is replaced by its tangent. Squared scores (IPO) then stay below 1e36 for |log-ratio| <= 1e4."""


def logratios(policy: PairLogps, reference: PairLogps | None) -> PairLogps:
    """Return log-probabilities of the policy minus the reference's, shapes (B,), with the policy's lengths."""
    assert reference is not None, "this loss compares the policy with a reference"
    return PairLogps(
        policy.chosen - reference.chosen,
        policy.rejected - reference.rejected,
        policy.chosen_lengths,
        policy.rejected_lengths,
    )


def scores(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> PairLogps:
    """Return f'(t) of chosen and rejected, shapes (B,), where t = policy / reference, as probabilities of the completion.

    f-DPO, arXiv 2309.16240: f' replaces the log-ratio ln t in losses of the difference of two scores.

        reverse_kl        f'(t) = ln t
        forward_kl        f'(t) = 1 - 1 / t
        js_divergence     f'(t) = ln(2 t / (1 + t))
        alpha_divergence  f'(t) = (t^(alpha - 1) - 1) / (alpha - 1), and ln t where alpha = 1

    Convention: f'(1) = 0, which matters for losses that divide by length before subtracting. alpha is TRL's:
    1 gives reverse_kl and 0 gives forward_kl, while the paper's alpha is 1 minus this one.

    Above an exponent of 30, exp is replaced by its tangent: values and gradients stay finite in float32 for log-ratios up
    to 1e4 either way, and a completion whose probability has collapsed is still pulled back. TRL 1.16 has no bound for
    forward_kl and stops the gradient at 80 for alpha_divergence.
    """
    score = F_DIVERGENCES[options.f_divergence]
    ratios = logratios(policy, reference)
    return PairLogps(
        score(ratios.chosen, options.alpha),
        score(ratios.rejected, options.alpha),
        ratios.chosen_lengths,
        ratios.rejected_lengths,
    )


def _expm1(exponents: Tensor) -> Tensor:
    # The tangent has exp's value and slope at the bound. A clamp alone would end the gradient there.
    excess = (exponents - LARGEST_EXPONENT).clamp(min=0)
    return torch.expm1(exponents.clamp(max=LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * excess


def _reverse_kl(ratios: Tensor, alpha: float) -> Tensor:
    return ratios


def _forward_kl(ratios: Tensor, alpha: float) -> Tensor:
    return -_expm1(-ratios)


def _js_divergence(ratios: Tensor, alpha: float) -> Tensor:
    # t / (1 + t) is the sigmoid of ln t.
    return math.log(2) + logsigmoid(ratios)


def _alpha_divergence(ratios: Tensor, alpha: float) -> Tensor:
    # At alpha = 1 the quotient is 0 / 0; its limit is the log-ratio.
    return ratios if alpha == 1 else _expm1((alpha - 1) * ratios) / (alpha - 1)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}
"""Value of `f_divergence` -> score of log-ratios, given alpha."""
