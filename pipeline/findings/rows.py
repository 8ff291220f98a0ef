"""The rows that a run has trained and evaluated on: rules of `rules.py`, which says when they find something."""

from __future__ import annotations

import math

from pipeline.findings.facts import RunFacts
from pipeline.ui.findings import Evidence, Finding, Severity

__all__ = ["evaluation_is_small", "few_prompts", "interval", "labels_flipped"]


def labels_flipped(run: RunFacts) -> Finding | None:
    if (gap := run.gap) is None:
        return None
    low, high = interval(gap.right, gap.pairs)
    if high > 0.4 or gap.gap > -0.1:
        return None
    severity: Severity = "error" if high < 0.25 and gap.gap < -0.3 else "warning"
    sentence = "The reference prefers the rejected answers: chosen and rejected may be swapped."
    evidence = (
        Evidence("% of pairs that the reference ranks right", round(100 * gap.right / gap.pairs, 1)),
        Evidence("95 % interval from", round(100 * low, 1)),
        Evidence("to", round(100 * high, 1)),
        Evidence("pairs", gap.pairs),
        Evidence("chosen minus rejected, nats a token", gap.gap),
    )
    advice = "read some rows (`prefray prepare` prints three); swap field_chosen and field_rejected if they are wrong"
    return Finding("labels_flipped", severity, sentence, evidence, advice)


def few_prompts(run: RunFacts) -> Finding | None:
    rows = run.rows
    if rows is None or rows.looked_at < 50 or rows.prompts > rows.looked_at / 5:
        return None
    evidence = (Evidence("distinct prompts", rows.prompts), Evidence("training rows", rows.looked_at))
    advice = "more prompts; or fewer epochs, since every prompt is seen many times in each"
    return Finding("few_prompts", "warning", "Few prompts are behind many rows.", evidence, advice)


def evaluation_is_small(run: RunFacts) -> Finding | None:
    accuracy = run.curves["eval_rewards/accuracies"]
    if not len(accuracy) or run.rows is None or not run.rows.evaluation:
        return None
    pairs = run.rows.evaluation
    low, high = interval(round(accuracy.last * pairs), pairs)
    if high - low <= 0.2:
        return None
    sentence = (
        f"An evaluation of {pairs} pairs is too small to tell accuracies apart that differ by less than {high - low:.2f}."
    )
    evidence = (
        Evidence("pairs evaluated", pairs),
        *((accuracy.at(0),) if len(accuracy) > 1 else ()),
        accuracy.at(-1),
        Evidence("95 % interval from", round(low, 3)),
        Evidence("to", round(high, 3)),
    )
    advice = "val_set_size: 200 or more rows (an interval of 14 points at most)"
    return Finding("evaluation_is_small", "warning" if pairs < 30 else "info", sentence, evidence, advice)


def interval(right: int, number: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share: `right` of `number` (Wilson, 1927)."""
    z = 1.959964
    share = right / number
    middle = (share + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return max(0.0, middle - half), min(1.0, middle + half)
