"""Hints for rows of another kind than the method takes."""

from __future__ import annotations

from pipeline.data.row_kinds import ROW_COLUMNS, methods
from pipeline.data.transforms.base import Row
from strategies.types import BatchKind

__all__ = ["hint"]


def hint(kind: BatchKind, row: Row) -> str:
    """Return advice to append to the error of a row that doesn't look like `kind`; "" when it does."""
    # First: any other hint would be about columns that such a row can't have.
    if column := _wrapped_list(row):
        return f"; the row is one object with a list under {column!r}, and rows must be a plain list or one object per line"
    if column := _sharegpt_column(row):
        return (
            f"; {column!r} holds messages with from and value: name them (message_property_mappings: {{role: from, content: "
            "value}) with a type of messages, such as chat_template.argilla_chat"
        )
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


def _sharegpt_column(row: Row) -> str | None:
    """Return the first column whose messages use ShareGPT's property names (from, value)."""
    for column, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and {"from", "value"} <= first.keys():
            return column
    return None


def _wrapped_list(row: Row) -> str | None:
    """Return the only column of a row when it is a list of rows: a whole dataset wrapped in one object."""
    if len(row) != 1:
        return None
    ((column, value),) = row.items()
    first = value[0] if isinstance(value, list) and value else None
    return column if isinstance(first, dict) and ROW_COLUMNS & first.keys() else None
