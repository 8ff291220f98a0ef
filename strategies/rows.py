"""Rows as a trainer takes them: raw ones, which TRL tokenises, or prepared ones, which pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, IterableDataset

from strategies.base import BatchKind

__all__ = [
    "ID_COLUMNS",
    "REFERENCE_COLUMNS",
    "ROW_ID",
    "as_dataset",
    "check_shape",
    "each_split",
    "first_row",
    "is_prepared",
    "is_scored",
    "placeholder_rows",
    "select",
]

ID_COLUMNS: dict[BatchKind, tuple[str, ...]] = {
    "pair": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "unpaired": ("prompt_ids", "completion_ids", "label"),
    "prompt": ("prompt_ids", "row"),
}
"""What training reads of a prepared row. `row` holds, as JSON, what the trainer is handed: `prompt` and other columns."""

ROW_ID = "row_id"
"""What a prepared row is called; rows of other origin may have one too."""

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""What the score stage adds to a prepared pair: the reference's log-probability of each completion token."""

PAIR_EXTRAS = (*REFERENCE_COLUMNS, ROW_ID)


def as_dataset(rows: Any, name: str) -> Any:
    """Return `rows` as a `datasets.Dataset` where it is a list of dicts; datasets pass through.

    Raises:
        ValueError: for no rows at all, or something that isn't rows.
    """
    if isinstance(rows, (list, tuple)):
        if not rows:
            raise ValueError(f"{name}: got no rows; give at least one")
        if not isinstance(rows[0], Mapping):
            raise ValueError(f"{name}: expected rows that are mappings, got {type(rows[0]).__name__}")
        try:
            return Dataset.from_list([dict(row) for row in rows])
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name}: a column has values of several types: {error}") from error
    if not isinstance(rows, IterableDataset) and not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise ValueError(f"{name}: expected a datasets.Dataset or a list of dicts, got {type(rows).__name__}")
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError(f"{name}: got no rows; give at least one")
    return rows


def each_split(function: Callable[[Any, str], Any], rows: Any, name: str) -> Any:
    """Apply `function(rows, name)` to rows, or to each split of a dict of them, under the split's name."""
    if isinstance(rows, dict):
        return {split: function(part, split) for split, part in rows.items()}
    return function(rows, name)


def first_row(rows: Any) -> dict[str, Any]:
    """The first row, of anything that `as_dataset` returns."""
    return next(iter(rows)) if isinstance(rows, IterableDataset) else rows[0]


def is_prepared(row: Mapping[str, Any], kind: BatchKind) -> bool:
    """Whether the row carries what a prepared row of the kind does, so that nothing is left to tokenise."""
    return all(column in row for column in ID_COLUMNS[kind])


def is_scored(row: Mapping[str, Any], name: str) -> bool:
    """Whether a prepared pair brings the reference's log-probabilities.

    Raises:
        ValueError: for sums in their place, as TRL's precomputation leaves them.
    """
    if not all(column in row for column in REFERENCE_COLUMNS):
        return False
    if not all(isinstance(row[column], Sequence) or hasattr(row[column], "__len__") for column in REFERENCE_COLUMNS):
        raise ValueError(
            f"{name}: {' and '.join(REFERENCE_COLUMNS)} must hold a list each, one log-probability per completion token, "
            f"got {type(row[REFERENCE_COLUMNS[0]]).__name__}; leave the columns out, or score the rows (prefray score)"
        )
    return True


def check_shape(row: Mapping[str, Any], kind: BatchKind, name: str) -> None:
    """Refuse rows of another kind, which TRL would turn into something or fail on much later.

    Raises:
        ValueError: naming what the rows lack, and what to do with them.
    """
    has = {column.removesuffix("_ids") for column, value in row.items() if value is not None}
    pair, unpaired = has >= {"chosen", "rejected"}, "completion" in has
    if kind == "pair" and not pair:
        hint = "labelled completions are for rl: kto" if unpaired else "prompts alone are for rl: grpo"
        raise ValueError(f"{name}: expected pairs (prompt, chosen, rejected), got rows of {_columns(row)}; {hint}")
    if kind == "unpaired" and pair:
        raise ValueError(
            f"{name}: expected labelled completions (prompt, completion, label), got pairs; split them with "
            "trl.data_utils.unpair_preference_dataset (in a recipe: `split_pairs: true`), or choose rl: dpo"
        )
    if kind == "unpaired" and not (unpaired and "label" in has):
        missing = "label" if unpaired else "completion"
        raise ValueError(
            f"{name}: expected labelled completions (prompt, completion, label), got rows of {_columns(row)}, "
            f"without {missing!r}; label is true for a good completion and false for a bad one"
        )
    if kind == "prompt" and "prompt" not in has:
        raise ValueError(f"{name}: expected prompts, got rows of {_columns(row)}, without 'prompt'")


def _columns(row: Mapping[str, Any]) -> str:
    return ", ".join(row) or "nothing"


def select(rows: Any, kind: BatchKind) -> Any:
    """Leave only what the collator reads: ids, labels, and of pairs also the reference's log-probabilities and names."""
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    row = first_row(rows)
    wanted = [column for column in (*ID_COLUMNS[kind], *(PAIR_EXTRAS if kind == "pair" else ())) if column in row]
    # The collator adds lists; rows in a torch or numpy format would be added as numbers.
    plain = rows.with_format(None)
    return plain if set(wanted) == set(row) else plain.select_columns(wanted)


def placeholder_rows(kind: BatchKind) -> Dataset:
    """One row that nothing trains on, for constructors that want rows before there are any."""
    if kind == "prompt":
        return Dataset.from_list([{"prompt": ""}])
    ids = {column: True if column == "label" else [0] for column in ID_COLUMNS[kind]}
    return Dataset.from_list([{**ids, **{column: [0.0] for column in REFERENCE_COLUMNS}} if kind == "pair" else ids])
