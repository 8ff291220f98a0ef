"""Hashes of the token ids of files and of single rows."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.io.digests import once

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ID_COLUMNS", "ROW_HASH_BYTES", "add_lists", "ids_digest", "row_hashes"]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROW_HASH_BYTES = 16


def ids_digest(path: Path) -> str:
    """Return the SHA-256 (hex) of all `row_id`s and token ids of a prepared part; texts don't count. Raises OSError."""

    def read() -> str:
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["row_id", *ID_COLUMNS], partitioning=None)
        # The order of rows counts: scores are stored row for row.
        digest = hashlib.sha256(table["row_id"].to_numpy().tobytes())
        for name in ID_COLUMNS:
            add_lists(digest, table[name])
        return digest.hexdigest()

    return once("ids", path, read)


def row_hashes(rows: pa.Table) -> pa.Array:
    """Return BLAKE2b of each row's token ids, fixed_size_binary[16]: a row's scores depend on nothing else."""
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
    joined = b"".join(hashlib.blake2b(part, digest_size=ROW_HASH_BYTES).digest() for part in parts)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_HASH_BYTES), len(rows), [None, pa.py_buffer(joined)])


def add_lists(digest: hashlib._Hash, column: pa.ChunkedArray) -> None:
    """Update a digest with the lengths and values of a column of lists."""
    import pyarrow.compute as pc

    digest.update(pc.list_value_length(column).to_numpy().tobytes())
    # By chunk, without lengths of chunks, so a file's row groups don't change the digest.
    for chunk in column.chunks:
        digest.update(chunk.flatten().to_numpy().tobytes())
