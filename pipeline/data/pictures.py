"""Pictures of a prepared store: files named by their content, each kept once, byte for byte as it came.

transforms/pictures.py   finds the pictures of a row, and their marks in its text
sources/pictures.py      reads them
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.io.digests import size_difference
from pipeline.io.storage import Folder, inside
from pipeline.io.threads import ahead

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "IMAGES",
    "list_pictures",
    "picture_column",
    "picture_damage",
    "picture_name",
    "picture_path",
    "read_picture",
    "store_picture",
]

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
    """Return the path of a picture in a store on a local path."""
    return store / IMAGES / name


def read_picture(store: Folder, name: str) -> bytes:
    """Read the bytes of a picture in a store. Raises OSError."""
    return store.read_bytes(f"{IMAGES}/{name}")


def store_picture(store: Folder, name: str, data: bytes) -> None:
    """Write a picture atomically, unless it exists. Raises OSError."""
    # Its size too: the file may be of another storage's cache, cut off.
    if store.size(file := f"{IMAGES}/{name}") != len(data):
        store.write_bytes(file, data)


def list_pictures(store: Folder, names: Iterable[str]) -> dict[str, Any]:
    """Write the list of a store's pictures, and delete the files of others; returns the manifest's entry of the list.

    Others are of rows that were dropped after their pictures had been written.

    Raises:
        OSError: also where a picture is missing.
    """
    import pyarrow as pa

    kept = {f"{IMAGES}/{name}": name for name in sorted(set(names))}
    sizes = store.files(IMAGES)
    if missing := next((file for file in kept if file not in sizes), None):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(inside(store.where, missing)))
    for file in sizes.keys() - kept.keys():
        store.delete(file)
    columns = {
        "name": pa.array(kept.values(), pa.string()),
        "bytes": pa.array([sizes[file] for file in kept], pa.int64()),
    }
    return {"file": LIST, **store.write_table(LIST, pa.table(columns))}


def picture_damage(store: Folder, entry: dict[str, Any], sizes: dict[str, int] | None = None) -> list[str]:
    """Return how the pictures of a store differ from its list, a phrase for each; compares sizes, not bytes.

    Args:
        store: its folder.
        entry: the manifest's entry of the list.
        sizes: of the store's files, where they are known.
    """
    if (problem := store.damage(entry, sizes)) is not None:
        return [problem]
    sizes = store.files(IMAGES) if sizes is None else sizes
    listed = ({"file": f"{IMAGES}/{row['name']}", "bytes": row["bytes"]} for row in store.read_table(LIST).to_pylist())
    return [problem for file in listed if (problem := size_difference(sizes.get(file["file"]), file)) is not None]


def picture_column(store: Folder, names: pa.ChunkedArray) -> pa.Array:
    """Return the pictures as trainers take them, list<struct<bytes, path>>.

    On a local path they are files by their absolute paths, read when needed; at a URI they are read here, each once.

    Args:
        names: list<string>, the column `images` of prepared rows.

    Raises:
        OSError: when one at a URI can't be read.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(names).fill_null(0).to_numpy()
    flat = pa.chunked_array([chunk.flatten() for chunk in names.chunks], pa.string()).combine_chunks()
    if store.is_local:
        paths = pc.binary_join_element_wise(f"{os.path.abspath(picture_path(Path(store.path), ''))}/", flat, "")
        values = [pa.nulls(len(flat), pa.binary()), paths]
    else:
        different = flat.unique().to_pylist()
        data = dict(zip(different, ahead(partial(read_picture, store), different), strict=True))
        values = [pa.array([data[name] for name in flat.to_pylist()], pa.binary()), flat]
    files = pa.StructArray.from_arrays(values, ["bytes", "path"])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, files)
