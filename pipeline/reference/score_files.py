"""Score files: those staged by tasks, and the part that is joined from them.

Columns of both: `row_id`; `ids`, the hash of the row's token ids and pictures (`hashing.row_hashes`), by which other scores
find it; `ref_chosen_logps`, `ref_rejected_logps` (list<float32>, one value per completion token); and with
`ray.score.hidden_states` also `ref_chosen_hidden`, `ref_rejected_hidden` (list<float16>, the mean last hidden state). The
footer holds the number of forwards and a digest of the content, by which a file is verified without a manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.io.atomic import write_table
from pipeline.reference.hashing import ROW_HASH_BYTES, add_lists, hashed_columns, row_hashes

__all__ = [
    "HIDDEN",
    "LOGPS",
    "RECOMPUTE",
    "Task",
    "forwards_of",
    "join_part",
    "missing_rows",
    "read_prepared",
    "read_rows",
    "read_scores",
    "score_columns",
    "stage_existing",
    "staged_files",
    "write_scores",
]

LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
HIDDEN = ("ref_chosen_hidden", "ref_rejected_hidden")
RECOMPUTE = "compute the scores again with `prefray score RECIPE --recompute`"
SUMMARY = b"prefray"
# Parquet names the items of a list "element"; with pyarrow's own name, "item", `concat_tables` would find two schemas.
_LIST = pa.list_(pa.field("element", pa.float32()))
_SCHEMA = pa.schema([("row_id", pa.int64()), ("ids", pa.binary(ROW_HASH_BYTES)), *((name, _LIST) for name in LOGPS)])


@dataclass(frozen=True)
class Task:
    """Rows `start` to `stop` of a part, such as `train/part-00000.parquet`: the unit of progress and of resuming."""

    part: str
    start: int
    stop: int
    rows: tuple[int, ...] = ()
    """Row indices, ascending, if only some from `start` to `stop` are missing; empty for all of them."""

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows) or self.stop - self.start

    def staged(self, staging: Path) -> Path:
        """Return the path of the task's file. It is unique: a row in a valid file is in no later task."""
        return staging / f"{_stem(self.part)}-{self.start:08d}-{self.stop:08d}.parquet"


def _stem(part: str) -> str:
    return part.removesuffix(".parquet").replace("/", "-")


def read_rows(prepared: Path, task: Task) -> pa.Table:
    """Read the task's rows of a prepared part: token ids, names of pictures where it has them, source and row number."""
    columns = ["row_id", "source", "row_number", *hashed_columns(prepared / task.part)]
    table = pq.read_table(prepared / task.part, columns=columns, partitioning=None)
    return table.take(list(task.rows)) if task.rows else table.slice(task.start, task.stop - task.start)


def read_prepared(prepared: Path, part: str) -> pa.Table:
    """Read `row_id` and hash what every row of a prepared part is scored by: the first columns of its scores."""
    table = pq.read_table(prepared / part, columns=["row_id", *hashed_columns(prepared / part)], partitioning=None)
    return pa.table({"row_id": table["row_id"], "ids": row_hashes(table)})


def score_columns(table: pa.Table, hidden: bool = True) -> list[str]:
    """Return the columns of a table of scores that hold values of the reference; those of hidden states only with `hidden`."""
    return [name for name in (*LOGPS, *(HIDDEN if hidden else ())) if name in table.column_names]


def write_scores(
    path: Path, rows: pa.Table, logps: Sequence[tuple[Any, Any]], forwards: int, hidden: Sequence[tuple[Any, Any]] = ()
) -> None:
    """Write scores of `rows`, row for row, `hidden` states if they are kept, and the number of forwards. Raises OSError."""
    # Hashed by the actor from the ids that it scored, so `join_part` notices rows that were changed meanwhile.
    columns = {"row_id": rows["row_id"], "ids": row_hashes(rows)}
    for index, name in enumerate(LOGPS):
        columns[name] = _lists([pair[index] for pair in logps], np.float32)
    for index, name in enumerate(HIDDEN if hidden else ()):
        columns[name] = _lists([pair[index] for pair in hidden], np.float16)
    _write(pa.table(columns), forwards, path)


def _lists(values: Sequence[Any], dtype: type[np.floating[Any]]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
    # numpy can't concatenate nothing.
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0, dtype), *values]).astype(dtype))


def _write(table: pa.Table, forwards: int, path: Path) -> None:
    # In the footer: a staged file has no manifest, and two files couldn't be written as one.
    summary = {"forwards": forwards, "sha256": _digest(table, forwards)}
    write_table(table.replace_schema_metadata({SUMMARY: json.dumps(summary).encode()}), path)


def _digest(table: pa.Table, forwards: int) -> str:
    digest = hashlib.sha256(str(forwards).encode())
    digest.update(table["row_id"].to_numpy().tobytes())
    digest.update(b"".join(table["ids"].to_pylist()))
    for name in score_columns(table):
        add_lists(digest, table[name])
    return digest.hexdigest()


def read_scores(path: Path) -> pa.Table | None:
    """Read a score file; None if it is missing, unreadable or fails its digest."""
    try:
        table = pq.read_table(path, partitioning=None)
        summary = json.loads(table.schema.metadata[SUMMARY])
        # In this order, whatever the file's: the digest depends on it.
        table = table.select(["row_id", "ids", *LOGPS, *score_columns(table)[len(LOGPS) :]])
        is_valid = summary["sha256"] == _digest(table, summary["forwards"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):  # ArrowException: corrupt pages raise any of its kind
        return None
    return table if is_valid else None


def forwards_of(path: Path) -> int:
    """Read the number of forwards run for a score file; rows reused from other scores add none."""
    return json.loads(pq.read_metadata(path).metadata[SUMMARY])["forwards"]


def staged_files(staging: Path, part: str) -> dict[Path, pa.Table]:
    """Read the staged files of a part. Damaged ones are deleted, so that their rows are computed again."""
    tables = {}
    for file in sorted(staging.glob(f"{_stem(part)}-*.parquet")):
        if (table := read_scores(file)) is not None:
            tables[file] = table
        else:
            file.unlink()
    return tables


def stage_existing(staging: Path, part: str, rows: pa.Table, existing: pa.Table) -> None:
    """Stage the rows (`row_id`, `ids`) of a part whose `ids` are in `existing`, other complete scores. Raises OSError."""
    table = _scores_of(rows.filter(pc.is_in(rows["ids"], value_set=existing["ids"])), existing)
    if len(table):
        # Named by its first row, as a task: no later copy has that row.
        first = pc.index_in(table["ids"].slice(0, 1), value_set=rows["ids"]).to_pylist()[0]
        _write(table, 0, staging / f"{_stem(part)}-known-{first:08d}.parquet")


def _scores_of(rows: pa.Table, existing: pa.Table) -> pa.Table:
    """Return `rows` joined with their scores on `ids`."""
    # The first match: rows with equal ids have equal scores.
    matches = existing.take(pc.index_in(rows["ids"], value_set=existing["ids"]))
    for name in score_columns(existing):
        rows = rows.append_column(name, matches[name])
    return rows


def join_part(folder: Path, staging: Path, part: str, rows: pa.Table) -> None:
    """Join the staged files of a part in the order of `rows` (`row_id`, `ids`), then delete them.

    Raises:
        UserError: when staged rows are missing or were changed; valid files stay.
        OSError: when the part can't be written.
    """
    staged = staged_files(staging, part)
    # Without the summaries, in which the files differ.
    tables = [table.replace_schema_metadata(None) for table in staged.values()]
    scores = pa.concat_tables(tables or [_SCHEMA.empty_table()])
    if missing := len(rows) - _count(pc.is_in(rows["ids"], value_set=scores["ids"])):
        raise UserError(f"{staging}: {missing} of {len(rows)} rows of {part} were changed since they were scored; run again")
    # The part is complete before its staged files are deleted: a process killed in between loses no row.
    _write(_scores_of(rows, scores), sum(forwards_of(file) for file in staged), folder / part)
    for file in staged:
        file.unlink()


def missing_rows(rows: pa.Table, tables: Iterable[pa.Table]) -> list[int]:
    """Return the indices of the rows whose `ids` are in none of the tables."""
    # With the type, since there may be no chunk to infer it from.
    existing = pa.chunked_array([chunk for table in tables for chunk in table["ids"].chunks], rows["ids"].type)
    return np.flatnonzero(~pc.is_in(rows["ids"], value_set=existing).to_numpy()).tolist()


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)
