"""Hashes of files, of their token ids and of single rows; a file is read once per process, as long as it stays as it is."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ID_COLUMNS", "ROW_HASH_BYTES", "add_lists", "file_digest", "ids_digest", "row_hashes"]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROW_HASH_BYTES = 16

_KNOWN: dict[tuple[str, str, int, int], str] = {}
"""(what, path, size, mtime in ns) -> digest: weights are gigabytes, and a sweep asks for them once per trial."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises OSError."""

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    key = _key("bytes", path)
    if key not in _KNOWN:
        _KNOWN[key] = read()
    return _KNOWN[key]


def ids_digest(path: Path) -> str:
    """SHA-256 of the `row_id` and the token ids of every row of a prepared part, in hex; its text counts for nothing."""
    key = _key("ids", path)
    if key not in _KNOWN:
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["row_id", *ID_COLUMNS], partitioning=None)
        digest = hashlib.sha256(table["row_id"].to_numpy().tobytes())
        for name in ID_COLUMNS:
            add_lists(digest, table[name])
        _KNOWN[key] = digest.hexdigest()
    return _KNOWN[key]


def row_hashes(rows: pa.Table) -> pa.Array:
    """BLAKE2b of each row's token ids, fixed_size_binary[16]: what a reference says of a row depends on nothing else."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = [b""] * len(rows)
    for name in ID_COLUMNS:
        lengths = pc.list_value_length(rows[name]).to_numpy().astype("<i8")
        flat = memoryview(pc.list_flatten(rows[name]).to_numpy().astype("<i4").tobytes())
        stops = np.cumsum(lengths) * 4
        for row, (start, stop) in enumerate(zip((stops - lengths * 4).tolist(), stops.tolist(), strict=True)):
            parts[row] += struct.pack("<q", stop - start) + flat[start:stop]
    joined = b"".join(hashlib.blake2b(part, digest_size=ROW_HASH_BYTES).digest() for part in parts)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(ROW_HASH_BYTES), len(rows), [None, pa.py_buffer(joined)])


def add_lists(digest: hashlib._Hash, column: pa.ChunkedArray) -> None:
    """Add a column of lists to a digest, lengths and values."""
    import pyarrow.compute as pc

    digest.update(pc.list_value_length(column).to_numpy().tobytes())
    for chunk in column.chunks:
        digest.update(chunk.flatten().to_numpy().tobytes())


def _key(what: str, path: Path) -> tuple[str, str, int, int]:
    status = path.stat()
    return what, str(path.resolve()), status.st_size, status.st_mtime_ns
