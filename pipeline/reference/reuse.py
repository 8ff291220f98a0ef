"""Reuse of rows that the same reference has scored before, for whatever data."""

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
from pipeline.io.digests import file_digest
from pipeline.reference.score_files import read_scores, score_columns, stage_existing

__all__ = ["reuse_existing_scores"]

SAME = ("format_version", "reference", "precision", "pictures")
"""Inputs that determine a row's scores, `pictures` where there are any; the others only select rows."""
HIDDEN_STATES = "hidden_states"
"""Input of scores that hold hidden states too: they serve those without, not the other way round."""


def reuse_existing_scores(root: Path, inputs: dict[str, Any], staging: Path, missing: dict[str, pa.Table]) -> None:
    """Stage missing rows that complete scores under `root` hold, matched by the hash of their token ids.

    Scores are read newest first, until all rows are found. Damaged or unreadable ones are skipped and their rows computed:
    only the recipe that they belong to reports damage.

    Args:
        inputs: inputs of the new scores.
        staging: folder of the new scores' staged files.
        missing: part -> its rows (`row_id`, `ids`) that aren't staged.

    Raises:
        OSError: when a staged file can't be written.
    """
    remaining = {row_hash for rows in missing.values() for row_hash in rows["ids"].to_pylist()}
    paths: dict[bytes, Path] = {}
    for path, entry in _parts(root, inputs) if remaining else ():
        # Only the column of hashes is read of every file; a file is verified once it has hits.
        if hashes := remaining.intersection(_ids(path)):
            if not _as_written(path, entry):
                continue
            paths.update(dict.fromkeys(hashes, path))
            remaining -= hashes
            if not remaining:
                break
    hidden = bool(inputs.get(HIDDEN_STATES))
    for part, rows in missing.items():
        # Sorted: which file comes first must not depend on the order of a set.
        files = sorted({paths[row_hash] for row_hash in rows["ids"].to_pylist() if row_hash in paths})
        if tables := _rows_in(files, rows["ids"], hidden):
            stage_existing(staging, part, rows, pa.concat_tables(tables))


def _parts(root: Path, inputs: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the parts of complete scores by the same reference, with their entries in the manifest."""
    for file in sorted(root.glob(f"*/{MANIFEST}"), key=_age):
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            score_inputs, fingerprint = manifest["inputs"], digest(manifest["inputs"])
            # A manifest that was edited, or moved to another folder, no longer says what its scores are.
            if fingerprint != file.parent.name or any(score_inputs.get(name) != inputs.get(name) for name in SAME):
                continue
            if inputs.get(HIDDEN_STATES) and not score_inputs.get(HIDDEN_STATES):
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


def _rows_in(files: Sequence[Path], ids: pa.ChunkedArray, hidden: bool) -> list[pa.Table]:
    """Return the scores of these rows from each readable file, with their hidden states or without."""
    tables = [table for file in files if (table := read_scores(file)) is not None]
    tables = [table.select(["row_id", "ids", *score_columns(table, hidden)]) for table in tables]
    return [table.replace_schema_metadata(None).filter(pc.is_in(table["ids"], value_set=ids)) for table in tables]
