"""Hashes of the token ids of files and of single rows, and of the names of their pictures, which are digests themselves."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.pictures import IMAGES
from pipeline.io.digests import once

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ID_COLUMNS", "ROW_HASH_BYTES", "add_lists", "hashed_columns", "ids_digest", "row_hashes"]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROW_HASH_BYTES = 16


def hashed_columns(path: Path) -> list[str]:
    """Return the columns of a prepared part that its scores depend on: token ids, and pictures where it has them."""
    import pyarrow.parquet as pq

    return [*ID_COLUMNS, *([IMAGES] if IMAGES in pq.read_schema(path).names else [])]


def ids_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of `row_id`s, token ids and pictures of a prepared part; texts don't count. Raises OSError."""

    def read() -> str:
        import pyarrow.parquet as pq

        columns = hashed_columns(path)
        table = pq.read_table(path, columns=["row_id", *columns], partitioning=None)
        # The order of rows counts: scores are stored row for row.
        digest = hashlib.sha256(table["row_id"].to_numpy().tobytes())
        for name in ID_COLUMNS:
            add_lists(digest, table[name])
        if IMAGES in columns:
            # As JSON, which keeps apart where a name and where a row ends.
            digest.update(json.dumps(table[IMAGES].to_pylist()).encode())
        return digest.hexdigest()

    return once("ids", path, read)


def row_hashes(rows: pa.Table) -> pa.Array:
    """Return BLAKE2b of each row's token ids and pictures, fixed_size_binary[16]: a row's scores depend on nothing else.

    A row without pictures has the hash that it has among rows of text alone.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = [b""] * len(rows)
    for name in ID_COLUMNS:
        # Explicitly little-endian: hashes are compared between machines.
        lengths = pc.list_value_length(rows[name]).to_numpy().astype("<i8")
        # One buffer for all rows, of which slices are views: no Python list per row.
        flat = memoryview(pc.list_flatten(rows[name]).to_numpy().astype("<i4").tobytes())
        stops = np.cumsum(lengths) * 4
        for row, (start, stop) in enumerate(zip((stops - lengths * 4).tolist(), stops.tolist(), strict=True)):
            # Lengths are hashed too: the same ids split otherwise into prompt and completions are another row.
            parts[row] += struct.pack("<q", stop - start) + flat[start:stop]
    for row, names in enumerate(rows[IMAGES].to_pylist() if IMAGES in rows.column_names else ()):
        if names:
            parts[row] += json.dumps(names).encode()
    joined = b"".join(hashlib.blake2b(part, digest_size=ROW_HASH_BYTES).digest() for part in parts)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_HASH_BYTES), len(rows), [None, pa.py_buffer(joined)])


def add_lists(digest: hashlib._Hash, column: pa.ChunkedArray) -> None:
    """Update a digest with the lengths and values of a column of lists."""
    import pyarrow.compute as pc

    digest.update(pc.list_value_length(column).to_numpy().tobytes())
    # By chunk, without lengths of chunks, so a file's row groups don't change the digest.
    for chunk in column.chunks:
        digest.update(chunk.flatten().to_numpy().tobytes())
