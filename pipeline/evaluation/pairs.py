"""Pairs under policy and reference: per-row values of what training reports as means."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas

    from pipeline.data import Prepared
    from pipeline.evaluation.subject import Subject
    from pipeline.reference import Scores

__all__ = ["PAIR_METRICS", "pair_values"]

Stage = Callable[[str], None]

PAIR_METRICS = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logratios/chosen",
    "logratios/rejected",
    "logps/chosen",
    "logps/rejected",
    "average_logps/accuracies",
    "average_logps/chosen",
    "average_logps/rejected",
    "length/chosen",
    "length/rejected",
)
"""What is reported of pairs; `rewards/` and `logratios/` only beside a reference, if the method's rewards need one."""


def pair_values(subject: Subject, prepared: Prepared, split: str, stage: Stage, progress: Any = None) -> pandas.DataFrame:
    """One row per pair: `row_id`, `source`, and the `PAIR_METRICS` that can be had.

    Log-probabilities are those of the score stage: computed once on its actors for each model and row, and kept.

    * `logratios/chosen`: log(policy / reference) of the completion, in nats.
    * `rewards/chosen`: beta times that; of simpo and orpo beta times the policy's log-probability per token.
    * `rewards/accuracies`: 1 where the chosen completion's reward is above the rejected one's; `average_logps/accuracies`: 1
      where its log-probability per token under the policy is.

    Args:
        split: whose rows are looked at.
        stage: is told what is computed.
        progress: as `pipeline.score` calls it.

    Raises:
        UserError, RunFailed: as `pipeline.score`.
    """
    from pipeline.reference import score

    stage("scoring the policy")
    policy = score(subject.policy, prepared, progress=progress, splits=(split,))
    reference = None
    if subject.reference is not None:
        stage("scoring the reference")
        reference = score(subject.reference, prepared, progress=progress, splits=(split,))
    table = prepared.read(split, ["row_id", "source", "chosen_length", "rejected_length"]).to_pandas()
    return table.assign(**_values(subject, policy, reference, split)).drop(columns=["chosen_length", "rejected_length"])


def _values(subject: Subject, policy: Scores, reference: Scores | None, split: str) -> dict[str, NDArray[np.float64]]:
    own, lengths = _sums(policy, split)
    found = {f"length/{side}": lengths[side].astype(np.float64) for side in SIDES}
    found |= {f"logps/{side}": own[side] for side in SIDES}
    average = {side: own[side] / np.maximum(lengths[side], 1) for side in SIDES}
    found |= {f"average_logps/{side}": average[side] for side in SIDES}
    found["average_logps/accuracies"] = (average["chosen"] > average["rejected"]).astype(np.float64)
    rewards = {side: subject.beta * average[side] for side in SIDES}
    if reference is not None:
        other, _ = _sums(reference, split)
        ratios = {side: own[side] - other[side] for side in SIDES}
        found |= {f"logratios/{side}": ratios[side] for side in SIDES}
        if subject.rewards_need_reference:
            scale = {side: np.maximum(lengths[side], 1) if subject.cfg.dpo_norm_loss else 1 for side in SIDES}
            rewards = {side: subject.beta * ratios[side] / scale[side] for side in SIDES}
    if reference is None and subject.rewards_need_reference:
        return found
    found |= {f"rewards/{side}": rewards[side] for side in SIDES}
    found["rewards/margins"] = rewards["chosen"] - rewards["rejected"]
    found["rewards/accuracies"] = (rewards["chosen"] > rewards["rejected"]).astype(np.float64)
    return {name: found[name] for name in PAIR_METRICS if name in found}


SIDES = ("chosen", "rejected")


def _sums(scores: Scores, split: str) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]]]:
    """Sums and numbers of the log-probabilities of each completion, shapes (rows,)."""
    table = scores.read(split)
    sums, lengths = {}, {}
    for side in SIDES:
        column = table[f"ref_{side}_logps"].combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        running = np.concatenate([[0.0], np.cumsum(column.flatten().to_numpy().astype(np.float64))])
        offsets = offsets - offsets[0]
        sums[side], lengths[side] = running[offsets[1:]] - running[offsets[:-1]], np.diff(offsets)
    return sums, lengths
