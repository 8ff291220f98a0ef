"""The strangest rows of each kind, to be looked at with their text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.inspection.rules import suspected_flips

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MOST", "StrangeRows", "strangest"]

MOST = 20
"""Rows of each kind."""


@dataclass(frozen=True)
class StrangeRows:
    """Rows of one kind, the strangest first."""

    name: str
    title: str
    column: str
    """What they are ordered by."""
    rows: pd.DataFrame
    """Of the table of all rows, at most `MOST`; the index is a row's position in it."""


def strangest(table: pd.DataFrame) -> list[StrangeRows]:
    """Return the strangest rows of every kind that the table has a column for and that has any."""
    kinds = []
    for name, title, column, ascending in KINDS:
        if column in table.columns:
            rows = _of_kind(name, table).sort_values(column, ascending=ascending, kind="stable").head(MOST)
            kinds.append(StrangeRows(name, title, column, rows))
    return [kind for kind in kinds if len(kind.rows)]


KINDS = (
    ("flips", "Labels that may be swapped", "score_gap", True),
    ("hard", "Answers that are alike inside the reference", "ches", False),
    ("longer", "Chosen answers that are much longer", "length_ratio", False),
    ("shorter", "Chosen answers that are much shorter", "length_ratio", True),
    ("benchmark", "Texts of a benchmark", "benchmark_overlap", False),
    ("copies", "Near duplicates", "near_duplicates", False),
    ("endless", "Answers without an end token", "answers_without_end", False),
    ("beginnings", "Unusual first tokens", "first_token_share", True),
    ("shortest", "Shortest rows", "tokens", True),
    ("longest", "Longest rows", "tokens", False),
)
"""Name, title, column, and whether low values are the strange ones."""


def _of_kind(name: str, table: pd.DataFrame) -> pd.DataFrame:
    if name == "flips":
        return table[suspected_flips(table)]
    if name == "copies":
        return table[table["near_duplicates"] > 0]
    if name in ("longer", "shorter"):
        return table[table["length_ratio"] > 1 if name == "longer" else table["length_ratio"] < 1]
    if name == "beginnings":
        return table[table["first_token_share"] < table["first_token_share"].median()]
    if name in ("endless", "benchmark"):
        return table[table["answers_without_end" if name == "endless" else "benchmark_overlap"] > 0]
    return table
