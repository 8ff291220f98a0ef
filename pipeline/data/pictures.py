"""Pictures of a prepared store: files beside its rows, which name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["IMAGES", "picture_column", "picture_path"]

IMAGES = "images"
"""Column of a row's pictures, in the order of their placeholders; also the folder of their files."""


def picture_path(store: Path, name: str) -> Path:
    """Return the file of a picture of the store in the folder `store`."""
    return store / IMAGES / name


def picture_column(store: Path, names: pa.ChunkedArray) -> pa.Array:
    """Return the pictures as trainers take them, list<struct<bytes, path>>: files by their absolute paths, read when needed.

    Args:
        names: list<string>, the column `images` of prepared rows.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(names).fill_null(0).to_numpy()
    flat = pa.chunked_array([chunk.flatten() for chunk in names.chunks], pa.string()).combine_chunks()
    paths = pc.binary_join_element_wise(f"{picture_path(store.absolute(), '')}/", flat, "")
    files = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, files)
