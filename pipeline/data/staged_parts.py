"""Staged parts of a store: files that tasks write, each with a summary in its footer, and that a killed run finds again."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from pipeline.data.sources.shards import Shard
from pipeline.io.storage import Folder
from pipeline.io.tables import decoded
from pipeline.io.threads import ahead

__all__ = ["STAGING", "part_name", "part_names", "rejected_of", "whole_parts", "write_part"]

STAGING = "staging"
SUMMARY = b"prefray"
REJECTED_SCHEMA = pa.schema(
    [("source", pa.string()), ("row_number", pa.int64()), ("reason", pa.string()), ("raw", pa.string())]
)


def part_name(shard: Shard, start: int) -> str:
    """Return the name of a shard's part that begins with row `start` of its file."""
    # The names sort in the order of the sources: the parts of a store are listed by name.
    return f"{_stem(shard)}{start:012d}.parquet"


def _stem(shard: Shard) -> str:
    return f"{shard.dataset:04d}-{shard.file:06d}-"


def part_names(shard: Shard, rows_per_part: int) -> list[str]:
    """Return the names of all parts of a shard whose end is known."""
    # Parts begin at multiples of `rows_per_part` of the file, as `stage_shard` groups rows, not at the shard's start.
    first = shard.start // rows_per_part * rows_per_part
    return [part_name(shard, max(start, shard.start)) for start in range(first, shard.stop or 0, rows_per_part)]


def write_part(staging: Folder, summary: dict[str, Any], table: pa.Table, rejected: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a part, which `summary` names, and its rejected rows; return the summary as `whole_parts` reads it."""
    name, text = summary["part"], json.dumps(summary)
    # The rejected rows are written first: an existing part means that its rejected file exists too.
    if rejected:
        staging.write_table(rejected_of(name), pa.Table.from_pylist(rejected, REJECTED_SCHEMA), checksums=True)
    # In the footer: rows and their counts appear together, or not at all.
    staging.write_table(name, table.replace_schema_metadata({SUMMARY: text.encode()}), checksums=True)
    return json.loads(text)


def rejected_of(part: str) -> str:
    """Return the name of the file with a part's rejected rows."""
    return part.removesuffix(".parquet") + ".rejected"


def whole_parts(staging: Folder, shard: Shard) -> dict[str, dict[str, Any]]:
    """Return name -> summary of the parts of a shard that were staged before; those that are damaged are left out."""
    names = [name for name in staging.files() if name.startswith(_stem(shard)) and name.endswith(".parquet")]
    starts = {name: int(name.removesuffix(".parquet").rpartition("-")[2]) for name in names}
    # A file may have several shards.
    mine = [name for name, start in starts.items() if shard.start <= start and (shard.stop is None or start < shard.stop)]
    summaries = ahead(lambda name: _summary(staging, name), mine)
    return {name: summary for name, summary in zip(mine, summaries, strict=True) if summary is not None}


def _summary(staging: Folder, name: str) -> dict[str, Any] | None:
    """Return the summary of a part whose bytes are whole."""
    part = _decoded(staging, name)
    summary = None if part is None else json.loads((part.schema.metadata or {}).get(SUMMARY, b"null"))
    is_whole = summary is not None and (not summary["rejected"] or _decoded(staging, rejected_of(name)) is not None)
    return summary if is_whole else None


def _decoded(staging: Folder, name: str) -> pa.Table | None:
    data = staging.read_bytes(name)
    try:
        return decoded(data)
    except (pa.ArrowException, OSError):  # cut off, or pages that fail their checksums
        return None
