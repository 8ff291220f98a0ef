"""Findings of rows, and the rules that find rows which are all wrong in one way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.store import EVAL
from pipeline.ui.findings import Evidence, Finding, Severity

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COPIES_ACROSS", "EMPTY_ANSWERS", "NO_END", "SAME_PROMPTS", "count_text", "finding_of", "names_of", "rows_finding"]

NAMED = 5
"""Most rows that a finding names."""


def finding_of(
    rule: str, severity: Severity, sentence: str, evidence: dict[str, Any], advice: str, rows: Sequence[str] = ()
) -> Finding:
    numbers = tuple(Evidence(what, float(value)) for what, value in evidence.items())
    return Finding(rule, severity, sentence, numbers, advice, tuple(rows))


def rows_finding(
    found: pd.DataFrame, rule: str, severity: Severity, sentence: str, evidence: dict[str, Any], advice: str
) -> Finding | None:
    return finding_of(rule, severity, sentence, evidence, advice, names_of(found)) if len(found) else None


def count_text(number: int, verb: str = "", verbs: str = "") -> str:
    """Return the number of rows with the verb that goes with it."""
    return f"{number:,} {'row' if number == 1 else 'rows'} {verb if number == 1 else verbs}".rstrip()


def names_of(rows: pd.DataFrame) -> list[str]:
    return [str(row_id) for row_id in rows["row_id"].head(NAMED)]


def _copies_across(table: pd.DataFrame) -> NDArray[np.bool_]:
    """Return the evaluation rows whose group of near duplicates has a training row."""
    group = np.where(table["duplicate_of"] < 0, table["row_id"], table["duplicate_of"])
    repeats, evaluated = (table["near_duplicates"] > 0).to_numpy(), (table["split"] == EVAL).to_numpy()
    return repeats & evaluated & np.isin(group, np.unique(group[repeats & ~evaluated]))


def _shortest(table: pd.DataFrame) -> pd.Series:
    names = ("chosen_length", "rejected_length", "completion_length")
    return table[[name for name in names if name in table.columns]].min(axis=1)


@dataclass(frozen=True)
class RowsOfAKind:
    """A rule that finds rows which are all wrong in one way: how many, among how many, and the first of them."""

    name: str
    is_one: Callable[[pd.DataFrame], Any]
    """From the table of all rows to which of them are, shape (rows,)."""
    sentence: str
    """With `{rows}` ("3 rows have"), `{number}`, `{total}` and `{share}`."""
    what: str
    """What they are, as evidence."""
    advice: str
    split: str | None = None
    """Of which rows they are a part; of all when None."""
    is_error_from: float = 2.0
    """Share from which it is an error; a warning below."""

    def __call__(self, table: pd.DataFrame) -> Finding | None:
        found = table[self.is_one(table)]
        total = int((table["split"] == self.split).sum()) if self.split is not None else len(table)
        number, share = len(found), len(found) / max(1, total)
        values = {
            "rows": count_text(number, "has", "have"),
            "number": f"{number:,}",
            "total": f"{total:,}",
            "share": f"{share:.1%}",
        }
        severity: Severity = "error" if share > self.is_error_from else "warning"
        evidence = {self.what: number, "evaluation rows" if self.split == EVAL else "rows": total}
        return rows_finding(found, self.name, severity, self.sentence.format(**values), evidence, self.advice)


NO_END = RowsOfAKind(
    "no_end",
    lambda table: table["answers_without_end"] > 0,
    "{rows} an answer without an end token ({share}): a run learns not to stop there.",
    "rows with an answer without end",
    "rows that excess_length_strategy: truncate has cut are such; else a chat template that writes the end after answers",
    is_error_from=0.5,
)
SAME_PROMPTS = RowsOfAKind(
    "same_prompts",
    lambda table: table["prompt_in_both"] & (table["split"] == EVAL),
    "The prompt of {number} of {total} evaluation rows is a training row's too: there memory is measured.",
    "evaluation rows with a prompt of training",
    "split_by: prompt (the default) with val_set_size keeps prompts apart; or take these rows out of test_datasets",
    EVAL,
)
COPIES_ACROSS = RowsOfAKind(
    "near_duplicates_across_splits",
    _copies_across,
    "Of {total} evaluation rows, {number} nearly repeat training rows.",
    "evaluation rows that are near duplicates",
    "take them out of the evaluation, whose numbers they flatter",
    EVAL,
)
EMPTY_ANSWERS = RowsOfAKind(
    "empty_answers",
    lambda table: _shortest(table) <= 1,
    "{rows} an answer of one token or none, its end token included.",
    "rows with such an answer",
    "take them out, or make sure that no answer is what should be learnt",
)
