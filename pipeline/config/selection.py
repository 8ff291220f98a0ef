"""The `select:` section: which training rows a run trains on, by the columns that `prefray inspect` computes.

Loads without torch and without ray.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, create_model

from strategies.keys import Keys
from strategies.types import BatchKind

__all__ = ["NEEDS", "ROW_COLUMNS", "Need", "RowColumn", "SelectConfig", "available_columns"]

Need = Literal["scores", "hidden"]
Side = Literal["top", "bottom", "middle"]
PAIR: tuple[BatchKind, ...] = ("pair",)
UNPAIRED: tuple[BatchKind, ...] = ("unpaired",)
BOTH: tuple[BatchKind, ...] = ("pair", "unpaired")
NEEDS: dict[Need, str] = {
    "scores": "the reference's cached scores (reference: cached, of dpo and ipo)",
    "hidden": "cached scores with ray.score.hidden_states: true",
}


@dataclass(frozen=True)
class RowColumn:
    """A number that `prefray inspect` computes for every row."""

    kinds: tuple[BatchKind, ...]
    """Kinds of rows that have it."""
    group: Literal["measures", "contents"]
    """measures: of the row alone, from its lengths and scores; contents: from its tokens, beside those of all other rows."""
    description: str
    need: Need | None = None
    """What must have been computed before."""


ROW_COLUMNS: dict[str, RowColumn] = {
    "prompt_length": RowColumn(BOTH, "measures", "tokens of the prompt"),
    "chosen_length": RowColumn(PAIR, "measures", "tokens of the chosen answer"),
    "rejected_length": RowColumn(PAIR, "measures", "tokens of the rejected answer"),
    "completion_length": RowColumn(UNPAIRED, "measures", "tokens of the answer"),
    "length_ratio": RowColumn(PAIR, "measures", "chosen_length / rejected_length"),
    "reference_chosen": RowColumn(PAIR, "measures", "log-probability of the chosen answer under the reference", "scores"),
    "reference_rejected": RowColumn(PAIR, "measures", "log-probability of the rejected answer under the reference", "scores"),
    "reference_margin": RowColumn(PAIR, "measures", "reference_chosen - reference_rejected", "scores"),
    "score_gap": RowColumn(
        PAIR, "measures", "mean log-probability per token of the chosen answer, less that of the rejected one", "scores"
    ),
    "ches": RowColumn(
        PAIR,
        "measures",
        "CHES score, length-normalized (arXiv 2410.08847): high where the answers are alike inside the reference",
        "hidden",
    ),
    "prompt_rows": RowColumn(BOTH, "contents", "rows with exactly this prompt, in both splits"),
    "near_duplicates": RowColumn(BOTH, "contents", "other rows in this row's group of near duplicates, in both splits"),
    "answers_without_end": RowColumn(BOTH, "contents", "answers of the row that don't end in an end token"),
    "first_token_share": RowColumn(BOTH, "contents", "share of answers that begin with the same token; the rarer of two"),
}
"""Columns that rows can be selected by, in the order in which they are shown."""

_FROM: Any = (
    Side,
    Field("top", description="Rows that are kept: those with the highest values, the lowest, or those in the middle."),
)
# Made by a call: `from` is a keyword of Python, which no class body can annotate.
_From: Any = create_model("_From", __base__=Keys, __module__=__name__, **{"from": _FROM})


class SelectConfig(_From):
    """The `select:` section."""

    by: str = Field(description=f"Column that rows are ordered by: {', '.join(ROW_COLUMNS)}.")
    keep: float = Field(gt=0, le=1, description="Fraction of the training rows that is kept.")

    @property
    def side(self) -> Side:
        """The value of `from`."""
        return getattr(self, "from")  # a keyword of Python

    def count(self, rows: int) -> int:
        """Return how many of `rows` training rows are kept."""
        return round(self.keep * rows)


def available_columns(kind: BatchKind, computed: Collection[Need]) -> list[str]:
    """Return the columns that rows of a kind have.

    Args:
        computed: what was computed, or will be before training.
    """
    return [name for name, column in ROW_COLUMNS.items() if kind in column.kinds and column.need in (None, *computed)]
