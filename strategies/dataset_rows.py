"""Input rows of trainers: raw ones, which TRL tokenises, or prepared ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value
from numpy.typing import NDArray

from strategies.media import CONVERSATIONS, MEDIA, PICTURES, refuse_media
from strategies.types import BatchKind
from strategies.vision.images import encode_pictures

__all__ = [
    "ID_COLUMNS",
    "REFERENCE_COLUMNS",
    "ROW_ID",
    "as_dataset",
    "check_shape",
    "checked_rows",
    "each_split",
    "first_row",
    "have_pictures",
    "picture_counts",
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
"""Columns of a prepared row that training reads. `row` holds the trainer's input as JSON: `prompt` and other columns."""

ROW_ID = "row_id"
"""Column with the id of a prepared row; other rows may have one too."""

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
"""Columns that the score stage adds to a prepared pair: the reference's log-probability of each completion token."""

PAIR_EXTRAS = (*REFERENCE_COLUMNS, ROW_ID)


def as_dataset(rows: Any, name: str) -> Any:
    """Convert a list of dicts to a `datasets.Dataset`; return data sets unchanged.

    Raises:
        ValueError: for no rows, or an unsupported type.
    """
    if isinstance(rows, (list, tuple)):
        if not rows:
            raise ValueError(f"{name}: got no rows; give at least one")
        if not isinstance(rows[0], Mapping):
            raise ValueError(f"{name}: expected rows that are mappings, got {type(rows[0]).__name__}")
        try:
            # All columns of all rows: `datasets` takes those of the first one, and loses the others.
            columns = dict.fromkeys(column for row in rows for column in row)
            encoded = (_encoded(row, f"{name}: row {index}") for index, row in enumerate(rows))
            return Dataset.from_list([{column: row.get(column) for column in columns} for row in encoded])
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name}: a column has values of several types: {error}") from error
    # Other map-style data sets are accepted by what they can do, as torch's data loader does.
    if not isinstance(rows, IterableDataset) and not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
        raise ValueError(f"{name}: expected a datasets.Dataset or a list of dicts, got {type(rows).__name__}")
    if hasattr(rows, "__len__") and len(rows) == 0:
        raise ValueError(f"{name}: got no rows; give at least one")
    return rows


def _encoded(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    try:
        return encode_pictures(row)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def checked_rows(rows: Any, name: str, supported: Sequence[str] = ()) -> Any:
    """Convert rows as `as_dataset`, and check that they hold no other media than those supported.

    Streamed rows are checked when they are read.

    Args:
        supported: columns of media, and types of a message's parts, that the trainer supports.

    Raises:
        ValueError: for rows with other images, audio or video.
    """
    rows = as_dataset(rows, name)
    if isinstance(rows, IterableDataset):
        return rows.map(refuse_media, fn_kwargs={"name": name, "supported": supported})
    for index, row in enumerate(_media_columns(rows)):
        refuse_media(row, f"{name}: row {index}", supported)
    return rows


def _media_columns(rows: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the columns of each row that may hold media; images are not decoded."""
    if not isinstance(rows, Dataset):
        yield from (rows[index] for index in range(len(rows)) if not rows[0].keys().isdisjoint((*MEDIA, *CONVERSATIONS)))
        return
    existing = [name for name in (*MEDIA, *CONVERSATIONS) if name in rows.column_names]
    if columns := [name for name in existing if name in MEDIA or _may_have_parts(rows.features[name])]:
        # In batches, as a data set may be larger than memory.
        for batch in rows.with_format("arrow").select_columns(columns).iter(100):
            yield from batch.to_pylist()


def _may_have_parts(feature: Any) -> bool:
    # Compared as text, which finds the content at any depth of lists and structs.
    return not isinstance(feature, Value) and "'content': Value('string')" not in str(feature)


def each_split(function: Callable[[Any, str], Any], rows: Any, name: str) -> Any:
    """Apply `function(rows, name)` to rows, or to each split of a dict of them, with the split's name."""
    if isinstance(rows, dict):
        return {split: function(part, split) for split, part in rows.items()}
    return function(rows, name)


def first_row(rows: Any) -> dict[str, Any]:
    """Return the first row of a result of `as_dataset`."""
    return next(iter(rows)) if isinstance(rows, IterableDataset) else rows[0]


def is_prepared(row: Mapping[str, Any], kind: BatchKind) -> bool:
    """Return whether the row has the columns of a prepared row of this kind, and needs no tokenisation."""
    return all(column in row for column in ID_COLUMNS[kind])


def is_scored(row: Mapping[str, Any], name: str) -> bool:
    """Return whether a prepared pair has the reference's log-probabilities per token.

    Raises:
        ValueError: for sums instead, as TRL's precomputation writes them.
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
    """Check the kind of rows, which TRL would convert or fail on much later.

    Raises:
        ValueError: naming the missing columns, and a remedy.
    """
    # Prepared rows of another kind come here as well, whose columns end in _ids. A null is as good as no column.
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
    """Select the columns that the collator reads: ids, labels, pictures, and of pairs also the reference's and row ids."""
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    row = first_row(rows)
    extras = PAIR_EXTRAS if kind == "pair" else ()
    wanted = [column for column in (*ID_COLUMNS[kind], *extras, *PICTURES) if column in row]
    # The collator concatenates lists by `+`, which would add numbers in a torch or numpy format.
    plain = rows.with_format(None)
    return plain if set(wanted) == set(row) else plain.select_columns(wanted)


def picture_counts(rows: Any) -> NDArray[np.int64]:
    """Return the number of pictures of each row, shape (rows,)."""
    if not isinstance(rows, Dataset):
        return np.array([len(row.get("images") or ()) + (row.get("image") is not None) for row in rows], dtype=np.int64)
    counts = np.zeros(len(rows), dtype=np.int64)
    for name in (name for name in PICTURES if name in rows.column_names):
        tables = rows.select_columns([name]).with_format("arrow").iter(10_000)
        counts += np.concatenate([_values(table[name]) for table in tables])
    return counts


def _values(column: pa.ChunkedArray) -> NDArray[np.int64]:
    # `images` is a list; `image` is one picture, or null.
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    numbers = pc.list_value_length(column).fill_null(0) if is_list else pc.is_valid(column)
    return numbers.to_numpy().astype(np.int64)


def have_pictures(rows: Any) -> bool:
    """Return whether any row has a picture, of one data set or a dict of several; None has none."""
    if isinstance(rows, dict):
        return any(map(have_pictures, rows.values()))
    # Not of a stream, which is read once: its rows are checked then.
    return rows is not None and not isinstance(rows, IterableDataset) and bool(picture_counts(rows).any())


def placeholder_rows(kind: BatchKind) -> Dataset:
    """Return one dummy row, for constructors that require rows before they are set."""
    if kind == "prompt":
        return Dataset.from_list([{"prompt": ""}])
    ids = {column: True if column == "label" else [0] for column in ID_COLUMNS[kind]}
    return Dataset.from_list([{**ids, **{column: [0.0] for column in REFERENCE_COLUMNS}} if kind == "pair" else ids])
