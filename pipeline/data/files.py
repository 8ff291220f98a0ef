"""Writes files whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["copy_file", "write_json", "write_table"]


def write_table(table: pa.Table, path: Path) -> None:
    """Parquet, at `path` once it is complete. Raises OSError, with nothing left behind."""
    _write(path, lambda file: pq.write_table(table, file, compression="zstd"))


def write_json(value: Any, path: Path) -> None:
    _write(path, lambda file: file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()))


def copy_file(source: Path, path: Path) -> None:
    with open(source, "rb") as reading:
        _write(path, lambda file: shutil.copyfileobj(reading, file))


def _write(path: Path, fill: Callable[[Any], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(unfinished, "wb") as file:
            fill(file)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
