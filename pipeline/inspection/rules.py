"""Rules that find what is wrong with data: one function each, from the columns of all rows to a finding or none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.inspection.row_findings import (
    COPIES_ACROSS,
    EMPTY_ANSWERS,
    NO_END,
    SAME_PROMPTS,
    count_text,
    finding_of,
    names_of,
    rows_finding,
)
from pipeline.ui.findings import Finding, Severity, by_severity

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OVERLAPPING", "RULES", "find_all", "suspected_flips"]

BIAS = 0.1
"""Distance of a share from one half that is reported, where chance doesn't explain it."""
FEWEST = 30
"""Pairs below which a share says nothing."""
OVERLAPPING = 0.5
"""Share of a text's 8-grams from which it counts as a benchmark's."""
RARE = 0.001
"""Share of answers below which their first token is unusual, in data of at least `MANY` rows."""
MANY = 1000
TELLING = 0.3
"""Difference between the shares of chosen and rejected answers that begin with a token from which it is reported."""
DEVIATIONS = 2.5
"""How far below the median a pair's score gap is suspect, in standard deviations, estimated by the median deviation."""

Rule = Callable[[Any], Finding | None]


def find_all(table: pd.DataFrame) -> tuple[Finding, ...]:
    """Return what the rules find, errors first.

    Args:
        table: of all rows: `split`, `row_id`, and the columns that were computed.
    """
    return by_severity(finding for needed, rule in RULES if needed <= {*table.columns} and (finding := rule(table)))


def suspected_flips(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Return which labels may be swapped: the reference prefers the rejected answer, per token, as it rarely does here."""
    gap = table["score_gap"].to_numpy()
    middle = np.median(gap) if len(gap) else 0.0
    # The median deviation, times 1.4826 for a normal distribution: the flipped pairs themselves hardly widen it.
    deviation = 1.4826 * np.median(np.abs(gap - middle)) if len(gap) else 0.0
    return (gap < 0) & (gap < middle - DEVIATIONS * deviation)


def length_bias(table: pd.DataFrame) -> Finding | None:
    chosen, rejected = table["chosen_length"].to_numpy(), table["rejected_length"].to_numpy()
    decided = int((chosen != rejected).sum())
    if decided < FEWEST:
        return None
    share = float((chosen > rejected).sum() / decided)
    half = 1.96 * math.sqrt(share * (1 - share) / decided)
    if abs(share - 0.5) < BIAS or abs(share - 0.5) < half:
        return None
    longer = "longer" if share > 0.5 else "shorter"
    return finding_of(
        "length_bias",
        "warning",
        f"The chosen answer is the {longer} one in {max(share, 1 - share):.0%} of pairs: length alone tells them apart, and a "
        f"run learns to write {longer} answers.",
        {
            "share of longer chosen answers": share,
            "half of its 95 % interval": half,
            "median chosen_length": np.median(chosen),
            "median rejected_length": np.median(rejected),
        },
        "dpo_norm_loss: true or rl: simpo, which divide by the length; or select: {by: length_ratio, from: middle, keep: 0.5}",
    )


def near_copies(table: pd.DataFrame) -> Finding | None:
    found = table[table["near_duplicates"] > 0]
    groups = int((found["duplicate_of"] < 0).sum())
    return rows_finding(
        found[found["duplicate_of"] >= 0],
        "near_duplicates",
        "warning" if len(found) > 0.01 * len(table) else "info",
        f"{count_text(len(found) - groups, 'nearly repeats', 'nearly repeat')} an earlier row (groups: {groups:,}).",
        {"rows in groups": len(found), "groups": groups, "largest group": found["near_duplicates"].max() + 1 if groups else 0},
        "dataset_exact_deduplication: true drops equal rows; select: {by: near_duplicates, from: bottom, keep: ...} keeps "
        "those without",
    )


def benchmark_rows(table: pd.DataFrame) -> Finding | None:
    overlap = table["benchmark_overlap"]
    some, found = int((overlap > 0).sum()), table[overlap >= OVERLAPPING]
    if not some:
        return None
    severity: Severity = "warning" if len(found) else "info"
    rows_have = count_text(len(found), "has", "have")
    many = f"{rows_have} a text of which half the 8-grams or more are a benchmark's; {some:,} share any."
    rows = found if len(found) else table[overlap > 0]
    evidence = {"rows with half of a text in a benchmark": len(found), "rows with any shared 8-gram": some}
    advice = "take these rows out: a benchmark that was trained on measures nothing"
    return rows_finding(
        rows.sort_values("benchmark_overlap", ascending=False), "benchmark_overlap", severity, many, evidence, advice
    )


def reference_ranks(table: pd.DataFrame) -> Finding | None:
    margin, gap = table["reference_margin"].to_numpy(), table["score_gap"].to_numpy()
    if not len(margin):
        return None
    right, right_per_token = float((margin > 0).mean()), float((gap > 0).mean())
    return finding_of(
        "reference_ranks",
        "info",
        f"The reference ranks {right:.0%} of pairs right already, by the whole answer's log-probability ({right_per_token:.0%} "
        f"per token), by {np.median(margin):+.3g} at the median.",
        {
            "share ranked right": right,
            "share ranked right per token": right_per_token,
            "median reference_margin": np.median(margin),
            "median score_gap": np.median(gap),
        },
        "select: {by: reference_margin, from: bottom, keep: 0.5} trains on those that it ranks wrong or hardly right; "
        "which part is best differs between data: search select.keep and select.from",
    )


def flips(table: pd.DataFrame) -> Finding | None:
    found = table[suspected_flips(table)].sort_values("score_gap")
    share = len(found) / max(1, len(table))
    return rows_finding(
        found,
        "label_flips",
        "warning",
        f"The labels of {count_text(len(found))} ({share:.1%}) may be swapped: the reference strongly prefers the rejected "
        "answer, per token, as it rarely does elsewhere in these data.",
        {
            "suspected flips": len(found),
            "lowest score_gap": found["score_gap"].min() if len(found) else 0,
            "median score_gap": table["score_gap"].median(),
        },
        "look at them (inspect.html); select: {by: score_gap, from: top, keep: 0.95} leaves the lowest out",
    )


def telling_beginnings(table: pd.DataFrame) -> Finding | None:
    chosen, rejected = table["chosen_first_token"].to_numpy(), table["rejected_first_token"].to_numpy()
    if len(table) < FEWEST:
        return None
    tokens = np.unique(np.concatenate([chosen, rejected]))
    shares = [np.searchsorted(np.sort(side), [tokens, tokens + 1]) / len(table) for side in (chosen, rejected)]
    in_chosen, in_rejected = (upto[1] - upto[0] for upto in shares)
    most = int(np.argmax(np.abs(in_chosen - in_rejected)))
    if abs(in_chosen[most] - in_rejected[most]) < TELLING:
        return None
    return finding_of(
        "telling_first_token",
        "warning",
        f"{in_chosen[most]:.0%} of chosen answers and {in_rejected[most]:.0%} of rejected ones begin with the same token (id "
        f"{tokens[most]}): a run may learn that token and little else.",
        {"share of chosen answers": in_chosen[most], "share of rejected answers": in_rejected[most], "token id": tokens[most]},
        "look at the rows: a template, or one model's habit, may write it; nothing is wrong if it is what should be learnt",
    )


def rare_beginnings(table: pd.DataFrame) -> Finding | None:
    if len(table) < MANY:
        return None
    found = table[table["first_token_share"] < RARE].sort_values("first_token_share")
    if len(found) > 0.05 * len(table):
        return None  # answers that all begin differently
    return rows_finding(
        found,
        "first_tokens",
        "info",
        f"{count_text(len(found), 'has', 'have')} an answer that begins as fewer than one in {1 / RARE:,.0f} answers do.",
        {"rows": len(found), "lowest first_token_share": found["first_token_share"].min() if len(found) else 0},
        "look at them (inspect.html): a template's piece, white space or a quotation may stand before the answer",
    )


def alike_inside(table: pd.DataFrame) -> Finding | None:
    scores = table["ches"].to_numpy()
    if len(scores) < FEWEST:
        return None
    top = table.sort_values("ches", ascending=False)
    return finding_of(
        "hard_pairs",
        "info",
        "Pairs with a high CHES score have answers that are alike inside the reference: they push both probabilities down.",
        {"highest ches": scores.max(), "95th percentile of ches": np.quantile(scores, 0.95), "median ches": np.median(scores)},
        "select: {by: ches, from: bottom, keep: 0.95} leaves out the highest",
        names_of(top),
    )


RULES: tuple[tuple[set[str], Rule], ...] = (
    ({"answers_without_end"}, NO_END),
    ({"prompt_in_both"}, SAME_PROMPTS),
    ({"near_duplicates"}, COPIES_ACROSS),
    ({"benchmark_overlap"}, benchmark_rows),
    ({"score_gap"}, flips),
    ({"length_ratio"}, length_bias),
    ({"near_duplicates"}, near_copies),
    ({"prompt_length"}, EMPTY_ANSWERS),
    ({"score_gap"}, reference_ranks),
    ({"ches"}, alike_inside),
    ({"chosen_first_token"}, telling_beginnings),
    ({"first_token_share"}, rare_beginnings),
)
"""Columns that a rule needs, and the rule."""
