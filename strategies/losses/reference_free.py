"""Losses without a reference: likelihood of the chosen completions, SimPO, ORPO. The argument `reference` is ignored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from strategies.losses.logistic import smoothed_logistic
from strategies.losses.types import LossOptions, PairLogps, averaged

__all__ = ["nll", "orpo_loss", "sft_loss", "simpo_loss"]


def nll(policy: PairLogps) -> Tensor:
    """Return the negative log-likelihood of each chosen completion per token, shape (B,): -chosen / |chosen|.

    The term that RPO, arXiv 2404.19733, equation 1, adds to the loss of pairs; the paper's reasoning and answer are one
    completion here.
    """
    # Without a reference, and so of the policy alone, also beside losses that have one.
    return -averaged(policy).chosen


def sft_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the likelihood loss of all chosen completions together, repeated for each pair, shape (B,).

    Negative log-likelihood of the chosen answers, averaged over the tokens of the global batch, as in TRL; to be combined
    with another loss. Every token has the same weight, unlike the term of `rpo_alpha`, which averages each answer separately.

    $$
    -\frac{\sum_i \log \pi_\theta(y_{w,i} \mid x_i)}{\sum_i \lvert y_{w,i} \rvert}
    $$
    """
    # A call must get the whole global batch (`couples`): means of its parts don't add up to the mean over its tokens.
    mean = -policy.chosen.sum() / policy.chosen_lengths.sum().clamp(min=1)
    # Callers average over pairs, which gives the mean again.
    return mean.expand(policy.chosen.shape)


def simpo_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of SimPO, shape (B,); with label smoothing that of TRL's CPO trainer.

    arXiv 2405.14734, equation 6. $\gamma$ is the target reward margin; the paper's recipes specify $\gamma / \beta$.

    $$
    -\log \sigma\left(\frac{\beta}{\lvert y_w \rvert} \log \pi_\theta(y_w \mid x) -
    \frac{\beta}{\lvert y_l \rvert} \log \pi_\theta(y_l \mid x) - \gamma\right)
    $$
    """
    values = averaged(policy)
    margins = options.beta * (values.chosen - values.rejected) - options.gamma
    return smoothed_logistic(margins, options.label_smoothing)


def orpo_loss(policy: PairLogps, reference: PairLogps | None, options: LossOptions) -> Tensor:
    r"""Return the loss of ORPO, shape (B,).

    arXiv 2403.07691, equations 6 and 7. With $a(y) = \log \pi_\theta(y \mid x) / \lvert y \rvert$ and $\lambda$ for
    `rl_beta`:

    $$
    -a(y_w) - \lambda \log \sigma\left(\log \frac{e^{a(y_w)}}{1 - e^{a(y_w)}} - \log \frac{e^{a(y_l)}}{1 - e^{a(y_l)}}\right)
    $$

    The likelihood covers the answer only, averaged per pair; TRL's includes the prompt, and averages over all tokens.
    """
    values = averaged(policy)
    log_odds_ratios = _log_odds(values.chosen) - _log_odds(values.rejected)
    # `beta`, the paper's lambda, weighs a term here; in the other losses it scales the margin.
    return -values.chosen - options.beta * logsigmoid(log_odds_ratios)


def _log_odds(average_logps: Tensor) -> Tensor:
    """Return ln(p / (1 - p)) of p = exp(average_logps), with finite value and gradient up to average_logps = 0.

    The log-probability is clamped one machine epsilon below 0, where p = 1 would have infinite odds.
    """
    logps = average_logps.clamp(max=-torch.finfo(average_logps.dtype).eps)
    # 1 - exp(x) loses its digits near x = 0, where likely tokens are; expm1 keeps them.
    return logps - torch.log(-torch.expm1(logps))
