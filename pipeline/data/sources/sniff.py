"""One look at the first bytes of a file: how it is compressed and encoded, and what form its JSON has."""

from __future__ import annotations

import codecs
import json
from dataclasses import replace

from pipeline.data.kinds import ROW_COLUMNS
from pipeline.data.sources.filesystem import File, open_bytes
from pipeline.data.sources.locate import Located
from pipeline.errors import UserError

__all__ = ["sniff"]

HEAD = 1 << 20
"""Bytes that are looked at."""
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
POINTER = b"version https://git-lfs.github.com/spec/"
ARCHIVES = {b"PK\x03\x04": "zip", b"7z\xbc\xaf\x27\x1c": "7z"}
BOMS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
WRAPPERS = {"data", "rows", "examples", "instances", "items", "records", "samples"}
"""What people call the list of rows in an object that holds them."""
SPACE = b" \t\r\n"
TEXTS = ("json", "jsonl", "csv")


def sniff(file: Located) -> Located:
    """The file as its bytes say that it has to be read.

    Raises:
        UserError: for a file without data: empty, an archive, or a pointer of Git LFS; for JSON whose rows aren't clear.
    """
    first = _head(replace(file, compression=None), 64)
    if not first:
        raise UserError(f"path: {file.name!r} is empty")
    if first.startswith(POINTER):
        raise UserError(f"path: {file.name!r} is a pointer of Git LFS, not the data; run `git lfs pull` where it was cloned")
    for magic, kind in ARCHIVES.items():
        if first.startswith(magic):
            raise UserError(f"path: {file.name!r} is a {kind} archive; unpack it, and name the file or folder")
    compression = next((kind for magic, kind in COMPRESSIONS.items() if first.startswith(magic)), None)
    file = replace(file, compression=compression)
    if file.format not in TEXTS:
        return file
    file = replace(file, encoding=_encoding(_head(file, 64)))
    return _with_rows(file) if file.format in ("json", "jsonl") else file


def _head(file: Located, size: int) -> bytes:
    """The first bytes, as UTF-8 where the encoding is known."""
    if file.compression is None and not File(file.where).info().size:
        return b""
    with open_bytes(file.where, file.compression, file.encoding) as stream:
        return stream.read(size)


def _encoding(head: bytes) -> str | None:
    """UTF-16, by its mark or by the zero bytes that it has in every other place; None for UTF-8."""
    if marked := next((name for mark, name in BOMS.items() if head.startswith(mark)), None):
        return marked
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        if len(head) >= 4 and not any(head[start::2]) and any(head[1 - start :: 2]):
            return name
    return None


def _with_rows(file: Located) -> Located:
    """Where the rows of JSON are: one per line, in an array, in objects over many lines, or in an object's list."""
    head = _head(file, HEAD)
    marked = head.startswith(codecs.BOM_UTF8)
    head = head.removeprefix(codecs.BOM_UTF8).lstrip(SPACE)
    values = replace(file, format="json", encoding="utf-8-sig" if marked else file.encoding)
    if head.startswith(b"["):
        return replace(values, rows_at="item")
    if not head.startswith(b"{"):
        return replace(file, format="jsonl")
    lines = [line for line in head.split(b"\n", 2) if line.strip(SPACE)]
    whole = len(head) < HEAD  # else its last line may be cut
    parses = [_parses(line) for line in (lines if whole else lines[:-1])[:2]]
    if (any(parses) and not (len(parses) == 1 and whole)) or (not whole and len(lines) == 1):
        return replace(file, format="jsonl")
    names, lists, others = _members(values)
    wrapped = len(names) == 1 or names & WRAPPERS or names <= set(lists)
    if others or names & ROW_COLUMNS or not wrapped:  # more objects follow, or this one is a row
        return replace(file, format="jsonl") if all(parses) else replace(values, rows_at="")
    named = [name for name in lists if name in WRAPPERS] or lists
    if len(named) == 1:
        return replace(values, rows_at=f"{named[0]}.item")
    if len(named) > 1:
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
    """Members of the first object, those that are lists of rows, objects that is; and whether another object follows it."""
    import ijson

    names: set[str] = set()
    lists: list[str] = []
    with open_bytes(file.where, file.compression, file.encoding) as stream:
        events = ijson.parse(stream, multiple_values=True, use_float=True)
        try:
            for prefix, event, value in events:
                if (prefix, event) == ("", "map_key"):
                    names.add(value)
                if event == "start_map" and prefix.endswith(".item") and prefix.count(".") == 1:
                    name = prefix.removesuffix(".item")
                    lists += [] if name in lists else [name]
                if (prefix, event) == ("", "end_map"):
                    break
            return names, lists, next(events, None) is not None
        except ijson.JSONError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"path: {file.name!r} does not parse as JSON: {reason}; it may be cut off") from error
