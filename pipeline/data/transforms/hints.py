"""The way out for rows that are no use because they are something else than the method takes."""

from __future__ import annotations

from pipeline.data.kinds import ROW_COLUMNS, methods
from pipeline.data.transforms.base import Row
from strategies.base import BatchKind

__all__ = ["hint"]


def hint(kind: BatchKind, row: Row) -> str:
    """What to add to the reason for refusing `row` where `kind` was wanted; "" when the row looks like that kind."""
    if column := _only_list(row):
        return f"; the row is one object with a list under {column!r}, and rows must be a plain list or one object per line"
    is_pair = row.get("chosen") is not None and row.get("rejected") is not None
    is_labelled = row.get("completion") is not None or row.get("label") is not None
    if kind == "unpaired" and is_pair and not is_labelled:
        return (
            "; the row is a pair (chosen, rejected): split_pairs: true makes two labelled rows of it, "
            f"and rl: {methods('pair')} takes pairs"
        )
    if kind == "pair" and is_labelled and not is_pair:
        return f"; this needs pairs (chosen, rejected): rl: {methods('unpaired')} takes rows with completion and label"
    if kind == "unpaired" and row.get("label") is None and not is_pair:
        return "; label is true for a good completion and false for a bad one, and field_label names its column"
    return ""


def _only_list(row: Row) -> str | None:
    """The one column of a row that holds rows itself: a whole data set, wrapped into an object."""
    if len(row) != 1:
        return None
    ((column, value),) = row.items()
    first = value[0] if isinstance(value, list) and value else None
    return column if isinstance(first, dict) and ROW_COLUMNS & first.keys() else None
