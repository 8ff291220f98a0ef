"""Rules that find what is wrong with data: one function each, from the columns of all rows to a finding or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import EVAL, TRAIN
from pipeline.ui.findings import Evidence, Finding, Severity, by_severity

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["OVERLAPPING", "RULES", "find_all", "suspected_flips"]

NAMED = 5
"""Most rows that a finding names."""
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
    return _finding(
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


def same_prompts(table: pd.DataFrame) -> Finding | None:
    found = table[table["prompt_in_both"] & (table["split"] == EVAL)]
    total = int((table["split"] == EVAL).sum())
    return _rows_finding(
        found,
        "same_prompts",
        "warning",
        f"The prompt of {len(found):,} of {total:,} evaluation rows is a training row's too: there memory is measured.",
        {"evaluation rows with a prompt of training": len(found), "evaluation rows": total},
        "split_by: prompt (the default) with val_set_size keeps prompts apart; or take these rows out of test_datasets",
    )


def near_copies(table: pd.DataFrame) -> Finding | None:
    found = table[table["near_duplicates"] > 0]
    groups = int((found["duplicate_of"] < 0).sum())
    return _rows_finding(
        found[found["duplicate_of"] >= 0],
        "near_duplicates",
        "warning" if len(found) > 0.01 * len(table) else "info",
        f"{_rows(len(found) - groups, 'nearly repeats', 'nearly repeat')} an earlier row (groups: {groups:,}).",
        {"rows in groups": len(found), "groups": groups, "largest group": found["near_duplicates"].max() + 1 if groups else 0},
        "dataset_exact_deduplication: true drops equal rows; select: {by: near_duplicates, from: bottom, keep: ...} keeps "
        "those without",
    )


def copies_across(table: pd.DataFrame) -> Finding | None:
    group = np.where(table["duplicate_of"] < 0, table["row_id"], table["duplicate_of"])
    trained = np.unique(group[((table["split"] == TRAIN) & (table["near_duplicates"] > 0)).to_numpy()])
    found = table[(table["split"] == EVAL).to_numpy() & (table["near_duplicates"] > 0).to_numpy() & np.isin(group, trained)]
    total = int((table["split"] == EVAL).sum())
    return _rows_finding(
        found,
        "near_duplicates_across_splits",
        "warning",
        f"Of {total:,} evaluation rows, {len(found):,} nearly repeat training rows.",
        {"evaluation rows that are near duplicates": len(found), "evaluation rows": total},
        "take them out of the evaluation, whose numbers they flatter",
    )


def benchmark_rows(table: pd.DataFrame) -> Finding | None:
    overlap = table["benchmark_overlap"]
    some, found = int((overlap > 0).sum()), table[overlap >= OVERLAPPING]
    if not some:
        return None
    severity: Severity = "warning" if len(found) else "info"
    many = f"{_rows(len(found), 'has', 'have')} a text of which half the 8-grams or more are a benchmark's; {some:,} share any."
    rows = found if len(found) else table[overlap > 0]
    evidence = {"rows with half of a text in a benchmark": len(found), "rows with any shared 8-gram": some}
    advice = "take these rows out: a benchmark that was trained on measures nothing"
    return _rows_finding(
        rows.sort_values("benchmark_overlap", ascending=False), "benchmark_overlap", severity, many, evidence, advice
    )


def reference_ranks(table: pd.DataFrame) -> Finding | None:
    margin, gap = table["reference_margin"].to_numpy(), table["score_gap"].to_numpy()
    if not len(margin):
        return None
    right, right_per_token = float((margin > 0).mean()), float((gap > 0).mean())
    return _finding(
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
    return _rows_finding(
        found,
        "label_flips",
        "warning",
        f"The labels of {_rows(len(found))} ({share:.1%}) may be swapped: the reference strongly prefers the rejected "
        "answer, per token, as it rarely does elsewhere in these data.",
        {
            "suspected flips": len(found),
            "lowest score_gap": found["score_gap"].min() if len(found) else 0,
            "median score_gap": table["score_gap"].median(),
        },
        "look at them (inspect.html); select: {by: score_gap, from: top, keep: 0.95} leaves the lowest out",
    )


def no_end(table: pd.DataFrame) -> Finding | None:
    found = table[table["answers_without_end"] > 0]
    share = len(found) / max(1, len(table))
    return _rows_finding(
        found,
        "no_end",
        "error" if share > 0.5 else "warning",
        f"{_rows(len(found), 'has', 'have')} an answer without an end token ({share:.1%}): a run learns not to stop there.",
        {"rows with an answer without end": len(found), "rows": len(table)},
        "rows that excess_length_strategy: truncate has cut are such; else a chat template that writes the end after answers",
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
    return _finding(
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
    return _rows_finding(
        found,
        "first_tokens",
        "info",
        f"{_rows(len(found), 'has', 'have')} an answer that begins as fewer than one in {1 / RARE:,.0f} answers do.",
        {"rows": len(found), "lowest first_token_share": found["first_token_share"].min() if len(found) else 0},
        "look at them (inspect.html): a template's piece, white space or a quotation may stand before the answer",
    )


def extreme_lengths(table: pd.DataFrame) -> Finding | None:
    names = [name for name in ("chosen_length", "rejected_length", "completion_length") if name in table.columns]
    shortest = table[names].min(axis=1)
    found = table[shortest <= 1]
    return _rows_finding(
        found,
        "empty_answers",
        "warning",
        f"{_rows(len(found), 'has', 'have')} an answer of one token or none, its end token included.",
        {"rows": len(found), "shortest answer": shortest.min() if len(table) else 0},
        "take them out, or make sure that no answer is what should be learnt",
    )


def alike_inside(table: pd.DataFrame) -> Finding | None:
    scores = table["ches"].to_numpy()
    if len(scores) < FEWEST:
        return None
    top = table.sort_values("ches", ascending=False)
    return _finding(
        "hard_pairs",
        "info",
        "Pairs with a high CHES score have answers that are alike inside the reference: they push both probabilities down.",
        {"highest ches": scores.max(), "95th percentile of ches": np.quantile(scores, 0.95), "median ches": np.median(scores)},
        "select: {by: ches, from: bottom, keep: 0.95} leaves out the highest",
        _names(top),
    )


RULES: tuple[tuple[set[str], Rule], ...] = (
    ({"answers_without_end"}, no_end),
    ({"prompt_in_both"}, same_prompts),
    ({"near_duplicates"}, copies_across),
    ({"benchmark_overlap"}, benchmark_rows),
    ({"score_gap"}, flips),
    ({"length_ratio"}, length_bias),
    ({"near_duplicates"}, near_copies),
    ({"prompt_length"}, extreme_lengths),
    ({"score_gap"}, reference_ranks),
    ({"ches"}, alike_inside),
    ({"chosen_first_token"}, telling_beginnings),
    ({"first_token_share"}, rare_beginnings),
)
"""Columns that a rule needs, and the rule."""


def _finding(
    rule: str, severity: Severity, sentence: str, evidence: dict[str, Any], advice: str, rows: Sequence[str] = ()
) -> Finding:
    numbers = tuple(Evidence(what, float(value)) for what, value in evidence.items())
    return Finding(rule, severity, sentence, numbers, advice, tuple(rows))


def _rows_finding(
    found: pd.DataFrame, rule: str, severity: Severity, sentence: str, evidence: dict[str, Any], advice: str
) -> Finding | None:
    return _finding(rule, severity, sentence, evidence, advice, _names(found)) if len(found) else None


def _rows(number: int, verb: str = "", verbs: str = "") -> str:
    """Return the number of rows with the verb that goes with it."""
    return f"{number:,} {'row' if number == 1 else 'rows'} {verb if number == 1 else verbs}".rstrip()


def _names(rows: pd.DataFrame) -> list[str]:
    return [str(row_id) for row_id in rows["row_id"].head(NAMED)]
