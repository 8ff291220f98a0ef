"""Detection of a file's format from its first bytes: compression, encoding, and the layout of its JSON."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import replace

from pipeline.data.row_kinds import ROW_COLUMNS
from pipeline.data.sources.filesystem import File, open_bytes
from pipeline.data.sources.locate import Located
from pipeline.errors import UserError

__all__ = ["sniff"]

HEAD = 1 << 20
"""Bytes that are examined."""
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
POINTER = b"version https://git-lfs.github.com/spec/"
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z"}
# One codec for both: Python's utf-16 reads the byte order from the mark, and drops it.
BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
WRAPPERS = {"data", "rows", "examples", "instances", "items", "records", "samples"}
"""Usual names of the list of rows in an object that wraps it."""
SPACE = b" \t\r\n"
TEXTS = ("json", "jsonl", "csv", "tsv")
TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow"}
"""First bytes of binary formats; they override a file's extension."""


def sniff(file: Located) -> Located:
    """Return the file with its actual format, compression, encoding and position of rows.

    Raises:
        UserError: for a file without data (empty, an archive, a pointer of Git LFS), and for JSON whose rows are ambiguous.
    """
    # The raw bytes: what a name says of the compression isn't trusted.
    first = _head(replace(file, compression=None), 64)
    if not first:
        raise UserError(f"path: {file.name!r} is empty")
    if first.startswith(POINTER):
        raise UserError(f"path: {file.name!r} is a pointer of Git LFS, not the data; run `git lfs pull` where it was cloned")
    for magic, format in ARCHIVES.items():
        if first.startswith(magic):
            raise UserError(f"path: {file.name!r} is a {format} archive; unpack it, and name the file or folder")
    compression = next((format for magic, format in COMPRESSIONS.items() if first.startswith(magic)), None)
    file = replace(file, compression=compression)
    start = _head(file, 64)
    for magic, format in TABLES.items():
        if start.startswith(magic):
            return replace(file, format=format)
    if file.format == "parquet":
        raise UserError(f"path: {file.name!r} is no Parquet, which begins with PAR1 (it begins with {start[:16]!r})")
    if file.format not in TEXTS:
        return file
    file = replace(file, encoding=_encoding(start))
    is_json = file.format in ("json", "jsonl") or _begins_as_json(_head(file, 64))
    return _with_rows(file) if is_json else file


def _begins_as_json(head: bytes) -> bool:
    """Return whether a file named as CSV holds rows of JSON."""
    return re.match(rb'(?:\xef\xbb\xbf)?\s*\[?\s*\{\s*"', head) is not None


def _head(file: Located, size: int) -> bytes:
    """Read the first bytes, as UTF-8 if the encoding is known."""
    if file.compression is None and not File(file.location).info().size:
        return b""
    with open_bytes(file.location, file.compression, file.encoding) as stream:
        return stream.read(size)


def _encoding(head: bytes) -> str | None:
    """Detect UTF-16, by its byte order mark or by zeros in every other byte; returns None for UTF-8."""
    if has_bom := next((name for mark, name in BOMS.items() if head.startswith(mark)), None):
        return has_bom
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        # ASCII text has a zero in every second byte; the others mustn't all be zero, as in binary data.
        if len(head) >= 4 and not any(head[start::2]) and any(head[1 - start :: 2]):
            return name
    return None


def _with_rows(file: Located) -> Located:
    """Find the rows of JSON: one per line, in an array, in objects over several lines, or in an object's list."""
    head = _head(file, HEAD)
    has_bom = head.startswith(codecs.BOM_UTF8)
    head = head.removeprefix(codecs.BOM_UTF8).lstrip(SPACE)
    values = replace(file, format="json", encoding="utf-8-sig" if has_bom else file.encoding)
    if head.startswith(b"["):
        return replace(values, rows_at="item")
    if not head.startswith(b"{"):
        return replace(file, format="jsonl")
    lines = [line for line in head.split(b"\n", 2) if line.strip(SPACE)]
    is_whole = len(head) < HEAD  # else its last line may be cut
    parses = [_parses(line) for line in (lines if is_whole else lines[:-1])[:2]]
    # A single line may be an object that wraps all rows, so it is examined further; longer than the head, it is taken as a row.
    if (any(parses) and not (len(parses) == 1 and is_whole)) or (not is_whole and len(lines) == 1):
        return replace(file, format="jsonl")
    # Neither lines nor an array: one object, which is a row itself or wraps a list of rows.
    names, lists, others = _members(values)
    # A row has more than one member, and not only lists; beside a list with a usual name, metadata is allowed.
    is_wrapper = len(names) == 1 or names & WRAPPERS or names <= set(lists)
    if others or names & ROW_COLUMNS or not is_wrapper:  # more objects follow, or this one is a row
        return replace(file, format="jsonl") if all(parses) else replace(values, rows_at="")
    # A usual name wins over other lists, such as of authors or tags.
    candidates = [name for name in lists if name in WRAPPERS] or lists
    if len(candidates) == 1:
        return replace(values, rows_at=f"{candidates[0]}.item")
    if len(candidates) > 1:
        raise UserError(
            f"path: {file.name!r} is one object with several lists of rows ({', '.join(lists)}); write the one that is meant "
            "to a file of its own, a row per line"
        )
    return replace(file, format="jsonl") if all(parses) else replace(values, rows_at="")


def _parses(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _members(file: Located) -> tuple[set[str], list[str], bool]:
    """Return the member names of the first object, those that are lists of objects, and whether another object follows it."""
    import ijson

    names: set[str] = set()
    lists: list[str] = []
    with open_bytes(file.location, file.compression, file.encoding) as stream:
        events = ijson.parse(stream, multiple_values=True, use_float=True)
        try:
            for prefix, event, value in events:
                if (prefix, event) == ("", "map_key"):
                    names.add(value)
                # ijson's prefix of an object in a list of the first object is NAME.item; deeper lists have more dots.
                if event == "start_map" and prefix.endswith(".item") and prefix.count(".") == 1:
                    name = prefix.removesuffix(".item")
                    lists += [] if name in lists else [name]
                if (prefix, event) == ("", "end_map"):
                    break
            # The parser stopped at the first object's end, so any further event is of another one.
            return names, lists, next(events, None) is not None
        except ijson.JSONError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"path: {file.name!r} does not parse as JSON: {reason}; it may be cut off") from error
