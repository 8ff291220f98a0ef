"""Pictures of a prepared store: files named by their content, each kept once, byte for byte as it came.

transforms/pictures.py   finds the pictures of a row, and their marks in its text
sources/pictures.py      reads them
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.io.atomic import write_bytes, write_table
from pipeline.io.digests import as_written, damage

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["IMAGES", "list_pictures", "picture_column", "picture_damage", "picture_name", "picture_path", "store_picture"]

IMAGES = "images"
"""Folder of the pictures in a store, and column of their names in its rows."""
LIST = "images.parquet"
"""File of the names and sizes of all pictures."""
EXTENSIONS = {"jpeg": "jpg", "mpo": "jpg"}
"""Name of a format -> extension, where they differ."""


def picture_name(data: bytes, picture_format: str) -> str:
    """Return the name of a picture: two digits, a folder, and the 32 digits of its bytes' hash."""
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return f"{digest[:2]}/{digest}.{EXTENSIONS.get(picture_format, picture_format)}"


def picture_path(store: Path, name: str) -> Path:
    """Return the path of a picture in a store."""
    return store / IMAGES / name


def store_picture(store: Path, name: str, data: bytes) -> None:
    """Write a picture atomically, unless it exists. Raises OSError."""
    path = picture_path(store, name)
    # Its size too: the file may be of another storage's cache, cut off.
    if not path.exists() or path.stat().st_size != len(data):
        write_bytes(data, path)


def list_pictures(store: Path, names: Iterable[str]) -> dict[str, Any]:
    """Write the list of a store's pictures, and delete the files of others; returns the manifest's entry of the list.

    Others are of rows that were dropped after their pictures had been written.

    Raises:
        OSError: also where a picture is missing.
    """
    import pyarrow as pa

    kept = sorted(set(names))
    sizes = [picture_path(store, name).stat().st_size for name in kept]
    expected = {picture_path(store, name) for name in kept}
    for path in (store / IMAGES).rglob("*"):
        if path.is_file() and path not in expected:
            path.unlink()
    write_table(pa.table({"name": pa.array(kept, pa.string()), "bytes": pa.array(sizes, pa.int64())}), store / LIST)
    return {"file": LIST, **as_written(store / LIST)}


def picture_damage(store: Path, entry: dict[str, Any]) -> list[str]:
    """Return how the pictures of a store differ from its list, a phrase for each; compares sizes, not bytes.

    Args:
        store: its folder.
        entry: the manifest's entry of the list.
    """
    import pyarrow.parquet as pq

    if (problem := damage(store / entry["file"], entry)) is not None:
        return [problem]
    problems = []
    for row in pq.read_table(store / entry["file"]).to_pylist():
        path = picture_path(store, row["name"])
        if not path.is_file():
            problems.append(f"{IMAGES}/{row['name']}: is missing")
        elif (size := path.stat().st_size) != row["bytes"]:
            problems.append(f"{IMAGES}/{row['name']}: has {size} bytes, {row['bytes']} were written")
    return problems


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
