"""Hashes of the token ids of files and of single rows, and of the names of their pictures, which are digests themselves."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.pictures import IMAGES
from pipeline.io.digests import once
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.threads import ahead

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.data import Prepared

__all__ = ["ID_COLUMNS", "ROW_HASH_BYTES", "add_lists", "hashed_columns", "ids_digests", "row_hashes"]

ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
ROW_HASH_BYTES = 16
KEPT = "ids.json"
"""File of the digests of a store at a URI: part -> SHA-256 of its bytes, and of its ids."""


def hashed_columns(prepared: Prepared) -> list[str]:
    """Return the columns of prepared rows that their scores depend on: token ids, and pictures where any row has them."""
    return [*ID_COLUMNS, *([IMAGES] if prepared.manifest.get("pictures") else [])]


def ids_digests(prepared: Prepared, parts: Sequence[str]) -> list[str]:
    """Return the SHA-256 (hex) of `row_id`s, token ids and pictures of prepared parts; texts don't count.

    Of a store at a URI they are kept in its folder, since they take all of its ids.

    Raises:
        UserError, OSError: as `Prepared.read_part`.
    """
    if prepared.folder.is_local:
        return [once("ids", Path(prepared.folder.path, part), partial(_ids_digest, prepared, part)) for part in parts]
    written = {entry["file"]: entry["sha256"] for entry in prepared.manifest["files"]}
    known = _kept(prepared)
    # By the bytes that they were computed from: the folder may hold others now.
    missing = [part for part in parts if known.get(part, {}).get("of") != written[part]]
    for part, digest in zip(missing, ahead(partial(_ids_digest, prepared), missing), strict=True):
        known[part] = {"of": written[part], "ids": digest}
    if missing:
        with suppress(*STORAGE_ERRORS):  # who may only read computes them each time
            prepared.folder.write_json(KEPT, known)
    return [known[part]["ids"] for part in parts]


def _kept(prepared: Prepared) -> dict[str, Any]:
    try:
        known = json.loads(prepared.folder.read(KEPT) or "{}")
        return {part: {"of": kept["of"], "ids": kept["ids"]} for part, kept in known.items()}
    except (ValueError, AttributeError, TypeError, KeyError):
        return {}


def _ids_digest(prepared: Prepared, part: str) -> str:
    columns = hashed_columns(prepared)
    table = prepared.read_part(part, ["row_id", *columns])
    # The order of rows counts: scores are stored row for row.
    digest = hashlib.sha256(table["row_id"].to_numpy().tobytes())
    for name in ID_COLUMNS:
        add_lists(digest, table[name])
    if IMAGES in columns:
        # As JSON, which keeps apart where a name and where a row ends.
        digest.update(json.dumps(table[IMAGES].to_pylist()).encode())
    return digest.hexdigest()


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
