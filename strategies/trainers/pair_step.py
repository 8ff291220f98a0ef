"""From token log-probabilities of a batch of pairs to sums per pair and metrics.

Tensors of tokens have shape (2B, T): B chosen sequences, then the B rejected ones in the same order; position t predicts
token t + 1. `mask` is 1 where the predicted token belongs to the completion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.losses.types import PairLogps, averaged
from strategies.metrics import MetricSums

__all__ = ["implicit_rewards", "mean_logratio", "pair_logps", "pair_sums", "wpo_weights"]


def pair_logps(per_token_logps: Tensor, mask: Tensor, ld_alpha: float | None = None) -> PairLogps:
    """Sum log-probabilities over the completions.

    With `ld_alpha` (LD-DPO, arXiv 2409.06411, equation 12) tokens beyond the shorter completion's length count
    `ld_alpha` instead of 1.
    """
    weights, lengths = mask.to(per_token_logps.dtype), mask.sum(dim=1)
    if ld_alpha is not None:
        shorter = torch.minimum(*lengths.chunk(2)).repeat(2)
        # Counted along the completion: in padded sequences it doesn't begin at position 0.
        beyond = mask.cumsum(dim=1) > shorter.unsqueeze(1)
        weights = torch.where(beyond, ld_alpha * weights, weights)
    return PairLogps(*(per_token_logps * weights).sum(dim=1).chunk(2), *lengths.chunk(2))


def wpo_weights(outputs: Any, mask: Tensor) -> Tensor:
    """Return the likelihood of each pair under the policy, shape (B,), without gradient: WPO, arXiv 2406.11827, equation 2.

    The mean over the completion of log p(token) - log sum_v p(v)^2, exponentiated, chosen times rejected.
    """
    aligned = (outputs.log_probs.detach() - outputs.log_sum_sq_probs) * mask
    chosen, rejected = torch.exp(aligned.sum(dim=1) / mask.sum(dim=1).clamp_min(1)).chunk(2)
    return chosen * rejected


def implicit_rewards(policy: PairLogps, reference: PairLogps | None, beta: float) -> tuple[Tensor, Tensor]:
    """Return the rewards of the chosen and the rejected completions, shape (B,), without gradient.

    beta * log(policy / reference), as DPO's; without a reference beta * log policy per token, as SimPO's (arXiv
    2405.14734, equation 3) and, by TRL's convention, ORPO's.
    """
    if reference is None:
        policy = averaged(policy)
        return beta * policy.chosen.detach(), beta * policy.rejected.detach()
    return beta * (policy.chosen - reference.chosen).detach(), beta * (policy.rejected - reference.rejected).detach()


def mean_logratio(policy: PairLogps, reference: PairLogps) -> Tensor:
    """Return the mean of log(policy / reference) over the chosen and the rejected completion, in nats, shape (B,), no gradient.

    It does not estimate a divergence, since neither completion was sampled from the policy: it is negative where the policy
    has moved its probability to other completions.
    """
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    return (0.5 * (chosen + rejected)).detach()


def pair_sums(outputs: Any, mask: Tensor, logps: PairLogps, rewards: tuple[Tensor, Tensor]) -> MetricSums:
    """Return the metrics of a batch, by TRL's names.

    Args:
        outputs: `TokenOutputs` of the policy, or TRL's `FusedCausalLMOutput`; fields of shape (2B, T).
        logps: of the policy, summed by `pair_logps`.
        rewards: of chosen and rejected, shape (B,) each.
    """
    chosen_mask, rejected_mask = mask.bool().chunk(2)
    chosen_mean_logits, rejected_mean_logits = outputs.mean_logits.chunk(2)
    chosen_is_top1, _ = outputs.is_top1.chunk(2)
    chosen_rewards, rejected_rewards = rewards
    per_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": logps.chosen.detach(),
        "logps/rejected": logps.rejected.detach(),
    }
    pairs = torch.tensor(len(chosen_rewards), device=mask.device)
    return {
        "entropy": ((outputs.entropy.detach() * mask).sum(), mask.sum()),
        "logits/chosen": (chosen_mean_logits[chosen_mask].sum(), chosen_mask.sum()),
        "logits/rejected": (rejected_mean_logits[rejected_mask].sum(), rejected_mask.sum()),
        "mean_token_accuracy": ((chosen_is_top1.bool() & chosen_mask).sum(), chosen_mask.sum()),
        **{name: (values.sum(), pairs) for name, values in per_pair.items()},
    }
