"""Parts of a prepared store, and their columns of lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.data.store import EVAL, TRAIN, Prepared

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["list_values", "parts_of"]


def parts_of(prepared: Prepared, splits: Sequence[str] = (TRAIN, EVAL)) -> dict[str, int]:
    """Return the parts of a store, such as `train/part-00000.parquet`, and their numbers of rows; train before eval."""
    entries = [(entry["file"], entry["rows"]) for entry in prepared.manifest["files"]]
    return {file: rows for split in splits for file, rows in entries if file.startswith(f"{split}/")}


def list_values(column: pa.ChunkedArray) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """Return the values of a column of lists, one after the other, and where each row's begin and end, shape (rows + 1,)."""
    import numpy as np
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy()
    return pc.list_flatten(column).to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
