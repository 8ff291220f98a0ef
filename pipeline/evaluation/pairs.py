"""Per-pair metrics under policy and reference, whose means are the metrics of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.reference import score

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa

    from pipeline.data import Prepared
    from pipeline.evaluation.resolve_models import Subject
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
"""Metrics of pairs. `logratios/` need a reference, `rewards/` only if the method's rewards do."""


def pair_values(subject: Subject, prepared: Prepared, split: str, stage: Stage, progress: Any = None) -> pandas.DataFrame:
    """Return one row per pair: `row_id`, `source`, and the available `PAIR_METRICS`.

    Log-probabilities come from the score stage: computed once per model and row, and cached.

    * `logratios/chosen`: log(policy / reference) of the completion, in nats.
    * `rewards/chosen`: beta times that; for simpo and orpo beta times the policy's log-probability per token.
    * `rewards/accuracies`: 1 where the chosen completion's reward is above the rejected one's; `average_logps/accuracies`: 1
      where its log-probability per token under the policy is.

    Args:
        split: the split to evaluate.
        stage: called with the name of each stage.
        progress: progress callback of `pipeline.score`.

    Raises:
        UserError, RunFailed: as `pipeline.score`.
    """
    stage("scoring the policy")
    # The score stage computes log-probabilities of its *reference*, so the policy is given to it as one.
    policy = score(subject.policy, prepared, progress=progress, splits=(split,))
    reference = None
    if subject.reference is not None:
        stage("scoring the reference")
        reference = score(subject.reference, prepared, progress=progress, splits=(split,))
    table = prepared.read(split, ["row_id", "source", "chosen_length", "rejected_length"]).to_pandas()
    return table.assign(**_values(subject, policy, reference, split)).drop(columns=["chosen_length", "rejected_length"])


def _values(subject: Subject, policy: Scores, reference: Scores | None, split: str) -> dict[str, NDArray[np.float64]]:
    policy_sums, lengths = _sums(policy, split)
    values = {f"length/{side}": lengths[side].astype(np.float64) for side in SIDES}
    values |= {f"logps/{side}": policy_sums[side] for side in SIDES}
    # An empty completion has no tokens to divide by.
    average = {side: policy_sums[side] / np.maximum(lengths[side], 1) for side in SIDES}
    values |= {f"average_logps/{side}": average[side] for side in SIDES}
    values["average_logps/accuracies"] = (average["chosen"] > average["rejected"]).astype(np.float64)
    # Rewards of simpo and orpo, which need no reference; replaced below for the other methods.
    rewards = {side: subject.beta * average[side] for side in SIDES}
    if reference is not None:
        reference_sums, _ = _sums(reference, split)
        ratios = {side: policy_sums[side] - reference_sums[side] for side in SIDES}
        values |= {f"logratios/{side}": ratios[side] for side in SIDES}
        if subject.rewards_need_reference:
            # dpo_norm_loss divides log-ratios by the completion's length, in training as here.
            scale = {side: np.maximum(lengths[side], 1) if subject.cfg.dpo_norm_loss else 1 for side in SIDES}
            rewards = {side: subject.beta * ratios[side] / scale[side] for side in SIDES}
    if reference is None and subject.rewards_need_reference:
        return values
    values |= {f"rewards/{side}": rewards[side] for side in SIDES}
    values["rewards/margins"] = rewards["chosen"] - rewards["rejected"]
    values["rewards/accuracies"] = (rewards["chosen"] > rewards["rejected"]).astype(np.float64)
    return {name: values[name] for name in PAIR_METRICS if name in values}


SIDES = ("chosen", "rejected")


def _sums(scores: Scores, split: str) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]]]:
    """Return the sum and the number of the log-probabilities of each completion, shapes (rows,)."""
    parts = [_part_sums(scores.read_part(part)) for part in scores.parts(split)]
    sums, lengths = ({side: np.concatenate([part[index][side] for part in parts]) for side in SIDES} for index in (0, 1))
    return sums, lengths


def _part_sums(table: pa.Table) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]]]:
    sums, lengths = {}, {}
    for side in SIDES:
        column = table[f"ref_{side}_logps"].combine_chunks()
        offsets = column.offsets.to_numpy().astype(np.int64)
        # Differences of running sums, in float64: `np.add.reduceat` would give an element, not 0, for an empty completion.
        running = np.concatenate([[0.0], np.cumsum(column.flatten().to_numpy().astype(np.float64))])
        # A slice's offsets don't begin at 0, but `flatten` returns only its own values.
        offsets = offsets - offsets[0]
        sums[side], lengths[side] = running[offsets[1:]] - running[offsets[:-1]], np.diff(offsets)
    return sums, lengths
