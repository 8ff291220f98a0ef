"""Reads the rows of a shard, one by one, whatever the format."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources import hub
from pipeline.data.sources.arrow import arrow_batches, decoded_rows, without_nulls
from pipeline.data.sources.filesystem import NETWORK_ERRORS, File, open_bytes, open_seekable
from pipeline.data.sources.shards import Shard
from pipeline.errors import UserError

__all__ = ["RawRow", "read_rows"]

BATCH_ROWS = 500


@dataclass(frozen=True)
class RawRow:
    """Row `index` (from 0) of its file; `fault` says why there is no `value` where `raw` does not parse."""

    index: int
    value: dict[str, Any] | None
    raw: str = ""
    fault: str = ""


def read_rows(shard: Shard) -> Iterator[RawRow]:
    """The rows of a shard in order.

    Raises:
        UserError: when the file cannot be read any further.
    """
    try:
        for row in READERS[shard.located.format](shard):
            if shard.stop is not None and row.index >= shard.stop:
                return
            if row.index >= shard.start:
                yield row
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{shard.located.name}: not UTF-8 text: {error}") from error
    except (*NETWORK_ERRORS, csv.Error) as error:
        raise UserError(f"{shard.located.name}: cannot be read as {shard.located.format}: {error}") from error


def _from_text(index: int, text: bytes) -> RawRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RawRow(index, None, text.decode(errors="replace"), f"does not parse as JSON: {error}")
    return _from_value(index, value)


def _from_value(index: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(index, value)
    return RawRow(index, None, json.dumps(value), f"must be an object, got {type(value).__name__}")


def _opened(shard: Shard) -> AbstractContextManager[IO[bytes]]:
    return open_bytes(shard.located.where, shard.located.compression, shard.located.encoding)


def _json_lines(shard: Shard) -> Iterator[RawRow]:
    """Blank lines count, so that an index is a line number, but are no rows."""
    if shard.offset:
        file = File(shard.located.where)
        with file.filesystem.open_input_file(file.path) as source:
            source.seek(shard.offset)
            yield from _lines(shard, source)
        return
    with _opened(shard) as source:
        yield from _lines(shard, source)


def _lines(shard: Shard, source: Any) -> Iterator[RawRow]:
    for index, line in enumerate(io.BufferedReader(source, 1 << 20), shard.begins_at):
        if shard.stop is not None and index >= shard.stop:
            return
        text = line.strip() if index else line.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            yield _from_text(index, text)


def _json_values(shard: Shard) -> Iterator[RawRow]:
    """The rows of an array, of a list of an object, or of objects over several lines."""
    import ijson

    index = 0
    with _opened(shard) as source:
        try:
            values = ijson.items(source, shard.located.rows_at, use_float=True, multiple_values=True)
            for index, value in enumerate(values):
                yield _from_value(index, value)
        except ijson.JSONError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{shard.located.name}: does not parse as JSON after row {index + 1}: {reason}") from error


def _csv(shard: Shard) -> Iterator[RawRow]:
    csv.field_size_limit(1 << 30)
    with _opened(shard) as source:
        lines = csv.reader(io.TextIOWrapper(source, encoding="utf-8-sig", newline=""))
        header = next(lines, [])
        for index, cells in enumerate(line for line in lines if line):
            if len(cells) == len(header):
                yield RawRow(index, dict(zip(header, cells, strict=True)))
            else:
                yield RawRow(index, None, json.dumps(cells), f"has {len(cells)} cells, the header has {len(header)}")


def _parquet(shard: Shard) -> Iterator[RawRow]:
    with open_seekable(shard.located.where, shard.located.compression) as source:
        file = pq.ParquetFile(source, pre_buffer=False)
        groups = range(shard.offset, file.metadata.num_row_groups)
        yield from _window(shard, file.iter_batches(BATCH_ROWS, row_groups=groups), shard.begins_at)


def _arrow(shard: Shard) -> Iterator[RawRow]:
    with open_seekable(shard.located.where, shard.located.compression) as source:
        yield from _window(shard, arrow_batches(source), 0)


def _window(shard: Shard, batches: Iterable[pa.RecordBatch], index: int) -> Iterator[RawRow]:
    """The rows of the shard out of batches that begin at row `index`; those before it are skipped without decoding."""
    for batch in batches:
        for first in range(min(max(shard.start - index, 0), batch.num_rows), batch.num_rows, BATCH_ROWS):
            if shard.stop is not None and index + first >= shard.stop:
                return
            for place, row in enumerate(decoded_rows(batch.slice(first, BATCH_ROWS)), index + first):
                yield RawRow(place, row)
        index += batch.num_rows


def _hub(shard: Shard) -> Iterator[RawRow]:
    dataset = hub.load(shard.hub_keys)
    for first in range(shard.start, shard.stop or 0, BATCH_ROWS):
        last = min(first + BATCH_ROWS, shard.stop or 0)
        for index, row in zip(itertools.count(first), dataset.select(range(first, last)), strict=False):
            yield RawRow(index, without_nulls(row))


READERS: dict[str, Callable[[Shard], Iterator[RawRow]]] = {
    "jsonl": _json_lines,
    "json": _json_values,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "hub": _hub,
}
