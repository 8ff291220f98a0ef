"""Reuse of rows that the same reference has scored before, for whatever data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.fingerprint import digest
from pipeline.data.store import MANIFEST
from pipeline.io.digests import difference
from pipeline.io.storage import Folder
from pipeline.reference.score_files import read_scores, score_columns, stage_existing

__all__ = ["reuse_existing_scores"]

SAME = ("format_version", "reference", "precision", "pictures")
"""Inputs that determine a row's scores, `pictures` where there are any; the others only select rows."""
HIDDEN_STATES = "hidden_states"
"""Input of scores that hold hidden states too: they serve those without, not the other way round."""


def reuse_existing_scores(root: Folder, inputs: dict[str, Any], staging: Folder, missing: dict[str, pa.Table]) -> list[str]:
    """Stage missing rows that complete scores under `root` hold, matched by the hash of their token ids.

    Scores are read newest first, until all rows are found. Damaged or unreadable ones are skipped and their rows computed:
    only the recipe that they belong to reports damage.

    Args:
        inputs: inputs of the new scores.
        staging: folder of the new scores' staged files.
        missing: part -> its rows (`row_id`, `ids`) that aren't staged.

    Returns:
        The parts of which rows were staged.

    Raises:
        OSError: when a staged file can't be written.
    """
    remaining = {row_hash for rows in missing.values() for row_hash in rows["ids"].to_pylist()}
    found: dict[bytes, str] = {}
    for file, entry in _parts(root, inputs) if remaining else ():
        # Only the column of hashes is read of every file; a file is verified once it has hits.
        if hashes := remaining.intersection(_ids(root, file)):
            if not _as_written(root, file, entry):
                continue
            found.update(dict.fromkeys(hashes, file))
            remaining -= hashes
            if not remaining:
                break
    hidden = bool(inputs.get(HIDDEN_STATES))
    staged = []
    for part, rows in missing.items():
        # Sorted: which file comes first must not depend on the order of a set.
        files = sorted({found[row_hash] for row_hash in rows["ids"].to_pylist() if row_hash in found})
        if tables := _rows_in(root, files, rows["ids"], hidden):
            stage_existing(staging, part, rows, pa.concat_tables(tables))
            staged.append(part)
    return staged


def _parts(root: Folder, inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the names of the parts of complete scores by the same reference, with their entries in the manifest."""
    ages = {name: root.modified(f"{name}/{MANIFEST}") for name in sorted(root.names())}
    for name, _ in sorted(((name, age) for name, age in ages.items() if age is not None), key=lambda pair: -pair[1]):
        try:
            manifest = json.loads(root.read(f"{name}/{MANIFEST}") or "")
            score_inputs, fingerprint = manifest["inputs"], digest(manifest["inputs"])
            # A manifest that was edited, or moved to another folder, no longer says what its scores are.
            if fingerprint != name or any(score_inputs.get(key) != inputs.get(key) for key in SAME):
                continue
            if inputs.get(HIDDEN_STATES) and not score_inputs.get(HIDDEN_STATES):
                continue
            parts = [(f"{name}/{entry['file']}", entry) for entry in manifest["files"]]
        except (ValueError, KeyError, TypeError, OSError):
            continue
        yield from parts


def _ids(root: Folder, file: str) -> list[bytes]:
    try:
        return root.read_table(file, ["ids"])["ids"].to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return []


def _as_written(root: Folder, file: str, entry: dict[str, Any]) -> bool:
    try:
        return difference(root.read_bytes(file), entry) is None
    except (OSError, KeyError):
        return False


def _rows_in(root: Folder, files: Sequence[str], ids: pa.ChunkedArray, hidden: bool) -> list[pa.Table]:
    """Return the scores of these rows from each readable file, with their hidden states or without."""
    tables = [table for file in files if (table := read_scores(root, file)) is not None]
    tables = [table.select(["row_id", "ids", *score_columns(table, hidden)]) for table in tables]
    return [table.replace_schema_metadata(None).filter(pc.is_in(table["ids"], value_set=ids)) for table in tables]
