"""One batch of pairs, from token log-probabilities to sums per pair and metrics.

Tensors of tokens have shape (2B, T): B chosen sequences, then the B rejected ones in the same order; position t stands
for the prediction of token t + 1. `mask` is 1 where the predicted token belongs to the completion.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strategies.losses import PairLogps

__all__ = ["gather_means", "pair_logps", "pair_sums", "wpo_weights"]


def pair_logps(per_token_logps: Tensor, mask: Tensor, lengths: Tensor, ld_alpha: float | None = None) -> PairLogps:
    """Sum log-probabilities over the completions.

    With `ld_alpha` (LD-DPO, arXiv 2409.06411, equation 12) tokens beyond the shorter completion's length count
    `ld_alpha` instead of 1.

    Args:
        lengths: completion lengths in tokens, shape (2B,).
    """
    weights = mask.to(per_token_logps.dtype)
    if ld_alpha is not None:
        counts = mask.sum(dim=1)
        shorter = torch.minimum(*counts.chunk(2)).repeat(2)
        beyond = mask.cumsum(dim=1) > shorter.unsqueeze(1)
        weights = torch.where(beyond, ld_alpha * weights, weights)
    chosen, rejected = (per_token_logps * weights).sum(dim=1).chunk(2)
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    return PairLogps(chosen, rejected, chosen_lengths, rejected_lengths)


def wpo_weights(outputs: Any, mask: Tensor) -> Tensor:
    """Likelihood of each pair under the policy, shape (B,), without gradient: WPO, arXiv 2406.11827, equation 2.

    The mean over the completion of log p(token) - log sum_v p(v)^2, exponentiated, chosen times rejected.
    """
    aligned = (outputs.log_probs.detach() - outputs.log_sum_sq_probs) * mask
    chosen, rejected = torch.exp(aligned.sum(dim=1) / mask.sum(dim=1).clamp_min(1)).chunk(2)
    return chosen * rejected


def pair_sums(
    outputs: Any, mask: Tensor, policy: PairLogps, reference: PairLogps, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics as (sum, count), so that adding both up over ranks gives the mean over all; names are TRL's.

    Args:
        outputs: TRL's `FusedCausalLMOutput` of the policy, fields of shape (2B, T).
    """
    chosen_mask, rejected_mask = mask.bool().chunk(2)
    chosen_mean_logits, rejected_mean_logits = outputs.mean_logits.chunk(2)
    chosen_is_top1, _ = outputs.is_top1.chunk(2)
    chosen_rewards = beta * (policy.chosen - reference.chosen).detach()
    rejected_rewards = beta * (policy.rejected - reference.rejected).detach()
    per_pair = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy.chosen.detach(),
        "logps/rejected": policy.rejected.detach(),
    }
    pairs = torch.tensor(len(chosen_rewards), device=mask.device)
    return {
        "entropy": ((outputs.entropy.detach() * mask).sum(), mask.sum()),
        "logits/chosen": (chosen_mean_logits[chosen_mask].sum(), chosen_mask.sum()),
        "logits/rejected": (rejected_mean_logits[rejected_mask].sum(), rejected_mask.sum()),
        "mean_token_accuracy": ((chosen_is_top1.bool() & chosen_mask).sum(), chosen_mask.sum()),
        **{name: (values.sum(), pairs) for name, values in per_pair.items()},
    }


def gather_means(accelerator: Any, sums: dict[str, tuple[Tensor, Tensor]], tokens: Tensor) -> tuple[dict[str, float], int]:
    """Add up sums, counts and tokens over ranks in one collective; returns the means by name, and all tokens.

    A metric that nothing counted towards is 0.
    """
    flat = torch.stack([value.float() for pair in sums.values() for value in pair] + [tokens.float()])
    *totals, all_tokens = accelerator.gather(flat.unsqueeze(0)).sum(dim=0).tolist()
    pairs = zip(sums, totals[::2], totals[1::2], strict=True)
    return {name: total / count if count else 0.0 for name, total, count in pairs}, round(all_tokens)
