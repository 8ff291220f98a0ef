"""Rows as a trainer takes them: raw pairs, which TRL tokenises, or prepared ones, which pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

__all__ = ["as_dataset", "each_split", "first_row", "is_prepared", "placeholder_rows", "select_prepared"]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def as_dataset(rows: Any, name: str) -> Any:
    """Return `rows` as a `datasets.Dataset` where it is a list of dicts; datasets pass through.

    Raises:
        ValueError: for no rows at all, or something that isn't rows.
    """
    if isinstance(rows, (list, tuple)):
        if not rows:
            raise ValueError(f"{name}: got no rows; give at least one pair")
        if not isinstance(rows[0], Mapping):
            raise ValueError(f"{name}: expected rows that are mappings, got {type(rows[0]).__name__}")
        return Dataset.from_list([dict(row) for row in rows])
    if not isinstance(rows, IterableDataset) and not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise ValueError(f"{name}: expected a datasets.Dataset or a list of dicts, got {type(rows).__name__}")
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError(f"{name}: got no rows; give at least one pair")
    return rows


def each_split(function: Callable[[Any, str], Any], rows: Any, name: str) -> Any:
    """Apply `function(rows, name)` to rows, or to each split of a dict of them, under the split's name."""
    if isinstance(rows, dict):
        return {split: function(part, split) for split, part in rows.items()}
    return function(rows, name)


def first_row(rows: Any) -> dict[str, Any]:
    """The first row, of anything that `as_dataset` returns."""
    return next(iter(rows)) if isinstance(rows, IterableDataset) else rows[0]


def is_prepared(row: Mapping[str, Any]) -> bool:
    """Whether the row carries token ids, so that nothing is left to tokenise."""
    return all(column in row for column in ID_COLUMNS)


def select_prepared(rows: Any) -> Any:
    """Leave only what the collator reads: ids, and summed reference log-probabilities where they are."""
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    row = first_row(rows)
    wanted = [column for column in (*ID_COLUMNS, *REFERENCE_COLUMNS) if column in row]
    # The collator adds lists; rows in a torch or numpy format would be added as numbers.
    plain = rows.with_format(None)
    return plain if set(wanted) == set(row) else plain.select_columns(wanted)


def placeholder_rows(token_id: int) -> Dataset:
    """One row that nothing trains on, for constructors that want rows before there are any."""
    return Dataset.from_list([{column: [token_id] for column in ID_COLUMNS}])
