"""Atomic writes of local files."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["copy_file", "write_bytes", "write_json", "write_table", "write_text"]


def write_table(table: pa.Table, path: Path) -> None:
    """Write Parquet atomically. Raises OSError, and leaves no file then."""
    import pyarrow.parquet as pq  # takes a fifth of a second, which commands that write only text save

    _write(path, lambda file: pq.write_table(table, file, compression="zstd"))


def write_json(value: Any, path: Path) -> None:
    """Write indented JSON atomically. Raises as `write_table`, and TypeError for a value that JSON doesn't have."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write text as UTF-8 atomically. Raises as `write_table`."""
    _write(path, lambda file: file.write(text.encode()))


def write_bytes(data: bytes, path: Path) -> None:
    """Write bytes atomically. Raises as `write_table`."""
    _write(path, lambda file: file.write(data))


def copy_file(source: Path, path: Path) -> None:
    """Copy a file's bytes, not its times and permissions, atomically. Raises as `write_table`."""
    with open(source, "rb") as reader:
        _write(path, lambda file: shutil.copyfileobj(reader, file))


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may write the same file, and the last one wins as a whole.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(unfinished, "wb") as file:
            fill(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
