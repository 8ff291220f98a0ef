"""Rows that other scores of the same reference have already, whatever data those were scored for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.fingerprint import digest
from pipeline.data.store import MANIFEST
from pipeline.reference.hashing import file_digest
from pipeline.reference.parts import read_scores, stage_known

__all__ = ["stage_others"]

SAME = ("format_version", "reference", "precision")
"""Inputs that decide a row's scores; the rest of them says which rows there are."""


def stage_others(root: Path, inputs: dict[str, Any], staging: Path, missing: dict[str, pa.Table]) -> None:
    """Stage the rows that complete scores under `root` hold, found by the hash of their token ids.

    What is there is read only as far as it's needed, the newest first. Scores that are damaged or can't be read are passed
    over: they are their own recipe's affair, and here their rows are computed.

    Args:
        inputs: of the scores that are to be.
        staging: their folder of staged files.
        missing: part -> its rows (`row_id`, `ids`) that aren't staged.

    Raises:
        OSError: when a staged file can't be written.
    """
    left = {one for rows in missing.values() for one in rows["ids"].to_pylist()}
    where: dict[bytes, Path] = {}
    for path, entry in _parts(root, inputs) if left else ():
        if here := left.intersection(_ids(path)):
            if not _as_written(path, entry):
                continue
            where.update(dict.fromkeys(here, path))
            left -= here
            if not left:
                break
    for part, rows in missing.items():
        files = sorted({where[one] for one in rows["ids"].to_pylist() if one in where})
        if known := _rows_in(files, rows["ids"]):
            stage_known(staging, part, rows, pa.concat_tables(known))


def _parts(root: Path, inputs: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Parts of complete scores by the same reference, as their manifests name them."""
    for file in sorted(root.glob(f"*/{MANIFEST}"), key=_age):
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            theirs, own = manifest["inputs"], digest(manifest["inputs"])
            if own != file.parent.name or any(theirs[name] != inputs[name] for name in SAME):
                continue
            parts = [(file.parent / entry["file"], entry) for entry in manifest["files"]]
        except (ValueError, KeyError, TypeError, OSError):
            continue
        yield from parts


def _age(file: Path) -> int:
    try:
        return -file.stat().st_mtime_ns
    except OSError:
        return 0


def _ids(path: Path) -> list[bytes]:
    try:
        return pq.read_table(path, columns=["ids"], partitioning=None)["ids"].to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return []


def _as_written(path: Path, entry: dict[str, Any]) -> bool:
    try:
        return file_digest(path) == entry.get("sha256")
    except OSError:
        return False


def _rows_in(files: Sequence[Path], ids: pa.ChunkedArray) -> list[pa.Table]:
    """Scores of these rows, out of each file that can still be read."""
    tables = [table for file in files if (table := read_scores(file)) is not None]
    return [table.replace_schema_metadata(None).filter(pc.is_in(table["ids"], value_set=ids)) for table in tables]
