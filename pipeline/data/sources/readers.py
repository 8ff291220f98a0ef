"""Readers of the rows of a shard, one by one, for each format."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.sources import hub
from pipeline.data.sources.arrow import arrow_batches, decoded_rows
from pipeline.data.sources.filesystem import NETWORK_ERRORS, File, open_bytes, open_seekable
from pipeline.data.sources.shards import Shard
from pipeline.data.strict_json import TWICE, strict_json
from pipeline.errors import UserError

__all__ = ["RawRow", "read_rows"]

BATCH_ROWS = 500
SEPARATORS = (",", ";", "\t", "|")
"""Column separators found in files named as CSV."""
ESCAPES = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|[^u])", re.DOTALL)
"""Escapes of JSON, matched in sequence, so that an escaped backslash starts none."""
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
ESCAPE_BYTES = 6
"""Bytes of the longest escape."""


@dataclass(frozen=True)
class RawRow:
    """Row `index` (from 0) of its file. Where `raw` does not parse, `value` is None and `fault` is the reason."""

    index: int
    value: dict[str, Any] | None
    raw: str = ""
    fault: str = ""


def read_rows(shard: Shard) -> Iterator[RawRow]:
    """Read the rows of a shard in order.

    Raises:
        UserError: when the file cannot be read any further.
    """
    try:
        for row in READERS[shard.located.format](shard):
            # A reader may yield whole batches or a whole file; the shard's bounds are applied here for all formats.
            if shard.stop is not None and row.index >= shard.stop:
                return
            if row.index >= shard.start:
                yield row
    # First, since it is a ValueError too, as are UnicodeDecodeError and pyarrow's ArrowInvalid.
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{shard.located.name}: not UTF-8 text: {error}") from error
    except (*NETWORK_ERRORS, csv.Error) as error:
        raise UserError(f"{shard.located.name}: cannot be read as {shard.located.format}: {error}") from error


def _recording_duplicates(duplicates: list[str]) -> type[dict[str, Any]]:
    """Return a dict class for objects of JSON that records duplicate keys in `twice`."""

    class Object(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            if key in self:
                duplicates.append(key)
            super().__setitem__(key, value)

    return Object


def _from_text(index: int, text: bytes) -> RawRow:
    try:
        # Parsed per line, so a broken one is a rejected row, not the end of the file.
        value = strict_json(text)
    except (ValueError, RecursionError) as error:
        return RawRow(index, None, text.decode(errors="replace"), f"does not parse as JSON: {error}")
    return _from_value(index, value)


def _from_value(index: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(index, value)
    return RawRow(index, None, json.dumps(value), f"must be an object, got {type(value).__name__}")


def _open(shard: Shard) -> AbstractContextManager[IO[bytes]]:
    return open_bytes(shard.located.location, shard.located.compression, shard.located.encoding)


def _json_lines(shard: Shard) -> Iterator[RawRow]:
    # Blank lines are counted, so that an index is a line number, but are no rows.
    if shard.offset:
        file = File(shard.located.location)
        with file.filesystem.open_input_file(file.path) as source:
            source.seek(shard.offset)
            yield from _lines(shard, source)
        return
    with _open(shard) as source:
        yield from _lines(shard, source)


def _lines(shard: Shard, source: Any) -> Iterator[RawRow]:
    for index, line in enumerate(io.BufferedReader(source, 1 << 20), shard.begins_at):
        if shard.stop is not None and index >= shard.stop:
            return
        # A byte order mark stands before the file's first line alone.
        text = line.strip() if index else line.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            yield _from_text(index, text)


class _SurrogateCheck:
    """Stream of JSON that rejects escapes of lone surrogates, which the parser would replace with a question mark."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source, self._rest = source, b""

    def read(self, size: int = -1) -> bytes:
        """Read the next bytes. Raises ValueError for a lone surrogate."""
        read = self._source.read(size)
        data = self._rest + read
        self._rest = self._incomplete_end(data, is_all=not read)
        return read

    @staticmethod
    def _incomplete_end(data: bytes, is_all: bool) -> bytes:
        """Return the end of `data` to check again with the next bytes; raises ValueError for a lone surrogate."""
        # A high surrogate needs a low one right after it; a pair, or any escape, may be cut by the end of the chunk.
        high: re.Match[bytes] | None = None
        done = 0
        for escape in ESCAPES.finditer(data) if SURROGATE.search(data) else ():
            code = int(escape[1], 16) if escape[1] else 0
            is_low = 0xDC00 <= code < 0xE000
            is_pair = is_low and high is not None and high.end() == escape.start()
            if (is_low or high is not None) and not is_pair:
                half = high if high is not None else escape
                raise ValueError(f"it holds half a character: {half[0].decode()!r}")
            high = escape if 0xD800 <= code < 0xDC00 else None
            done = escape.end()
        if high is not None:
            if is_all or len(data) >= high.end() + ESCAPE_BYTES:
                raise ValueError(f"it holds half a character: {high[0].decode()!r}")
            return data[high.start() :]
        escape_start = data.rfind(b"\\", max(done, len(data) - ESCAPE_BYTES))
        while escape_start > done and data[escape_start - 1 : escape_start] == b"\\":
            escape_start -= 1
        return data[escape_start:] if escape_start >= 0 else b""


def _json_values(shard: Shard) -> Iterator[RawRow]:
    """Read the rows of an array, of a list in an object, or of objects over several lines."""
    import ijson

    number, duplicates = 0, list[str]()
    # use_float: numbers would be Decimal otherwise. multiple_values: objects may follow one another without an array.
    options = {"map_type": _recording_duplicates(duplicates), "use_float": True, "multiple_values": True}
    with _open(shard) as source:
        try:
            for index, value in enumerate(ijson.items(_SurrogateCheck(source), shard.located.rows_at, **options)):
                row = _from_value(index, value)
                if duplicates:
                    fault = f"does not parse as JSON: {TWICE.format(duplicates[0])}"
                    row = RawRow(index, None, json.dumps(value, ensure_ascii=False), fault)
                yield row
                number = index + 1
                # Filled while the parser builds the next row, so it must be empty by then.
                duplicates.clear()
        except (ijson.JSONError, ValueError) as error:
            reason = str(error).splitlines()[0]
            hint = " (JSON knows no NaN and no Infinity)" if "invalid char" in reason else ""
            raise UserError(f"{shard.located.name}: does not parse as JSON after row {number}: {reason}{hint}") from error


def _csv(shard: Shard) -> Iterator[RawRow]:
    # Python's default, 128 KiB, is less than a long conversation in one cell.
    csv.field_size_limit(1 << 30)
    separator = "\t" if shard.located.format == "tsv" else ","
    with _open(shard) as source:
        # utf-8-sig drops the byte order mark of spreadsheets, which would become a part of the first column's name.
        text = io.TextIOWrapper(source, encoding="utf-8-sig", newline="")
        # strict: without it, text after a closing quote is joined to the cell silently.
        lines = csv.reader(text, delimiter=separator, strict=True)
        try:
            header = next(lines, [])
            _check_header(shard.located.name, header, separator)
            # The reader gives [] for a blank line.
            for index, cells in enumerate(line for line in lines if line):
                # TSV often has unquoted quotes in its text; one at a cell's start swallows what follows up to the next quote.
                if separator == "\t" and any("\t" in cell or "\n" in cell for cell in cells):
                    yield RawRow(
                        index, None, json.dumps(cells), "a cell holds a tab or a line break: a quote is open before it"
                    )
                elif len(cells) == len(header):
                    yield RawRow(index, dict(zip(header, cells, strict=True)))
                else:
                    yield RawRow(index, None, json.dumps(cells), f"has {len(cells)} cells, the header has {len(header)}")
        except csv.Error as error:  # all that follows would be read as a part of the cell
            raise UserError(
                f"{shard.located.name}: a quote is not closed, or closed within a cell, up to line {lines.line_num} ({error}); "
                'in CSV a quote within a quoted cell is written twice: ""'
            ) from error


def _check_header(name: str, header: list[str], separator: str) -> None:
    """Raise UserError for a header with another column separator, or with a duplicate column."""
    other = next((sign for sign in SEPARATORS if sign != separator and len(header) == 1 and sign in header[0]), None)
    if other is not None:
        hint = ", or call the file .tsv" if other == "\t" else ""
        raise UserError(
            f"{name}: the header is one column, {header[0][:80]!r}; separate columns by {separator!r}, not by {other!r}{hint}"
        )
    if duplicates := sorted({column for column in header if column and header.count(column) > 1}):
        raise UserError(f"{name}: the header names the column {duplicates[0]!r} twice; rename or remove one")


def _parquet(shard: Shard) -> Iterator[RawRow]:
    with open_seekable(shard.located.location, shard.located.compression) as source:
        # pre_buffer would hold all columns of a row group in memory at once.
        file = pq.ParquetFile(source, pre_buffer=False)
        groups = range(shard.offset, file.metadata.num_row_groups)
        yield from _window(shard, file.iter_batches(BATCH_ROWS, row_groups=groups), shard.begins_at)


def _arrow(shard: Shard) -> Iterator[RawRow]:
    with open_seekable(shard.located.location, shard.located.compression) as source:
        yield from _window(shard, arrow_batches(source), 0)


def _window(shard: Shard, batches: Iterable[pa.RecordBatch], index: int) -> Iterator[RawRow]:
    """Read the shard's rows from batches that begin at row `index`; rows before the shard are skipped without decoding."""
    for batch in batches:
        # In slices: a single batch of Arrow may hold the whole file, and its Python objects take many times its size.
        for first in range(min(max(shard.start - index, 0), batch.num_rows), batch.num_rows, BATCH_ROWS):
            if shard.stop is not None and index + first >= shard.stop:
                return
            for position, row in enumerate(decoded_rows(batch.slice(first, BATCH_ROWS)), index + first):
                yield RawRow(position, row)
        index += batch.num_rows


def _hub(shard: Shard) -> Iterator[RawRow]:
    dataset = hub.load(shard.hub_keys)
    for first in range(shard.start, shard.stop or 0, BATCH_ROWS):
        last = min(first + BATCH_ROWS, shard.stop or 0)
        # strict=False, since one of them is endless.
        for index, row in zip(itertools.count(first), hub.rows(dataset, first, last), strict=False):
            yield RawRow(index, row)


READERS: dict[str, Callable[[Shard], Iterator[RawRow]]] = {
    "jsonl": _json_lines,
    "json": _json_values,
    "csv": _csv,
    "tsv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "hub": _hub,
}
