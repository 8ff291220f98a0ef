"""Files of scores: what a task has staged, and the part that is joined from it.

Columns of both: `row_id`, and `ref_chosen_logps`, `ref_rejected_logps` (list<float32>, one value per completion token).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.files import write_table
from pipeline.errors import UserError
from pipeline.reference.hashing import ID_COLUMNS

__all__ = ["LOGPS", "RECOMPUTE", "Task", "check_part", "forwards_of", "join_part", "part_rows", "read_rows", "write_scores"]

LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
RECOMPUTE = "compute the scores again with `prefray score RECIPE --recompute`"
SUMMARY = b"prefray"
_WITNESS = ["row_id", "chosen_length", "rejected_length"]


@dataclass(frozen=True)
class Task:
    """Rows `start` to `stop` of a part, such as `train/part-00000.parquet`; one forward of an actor takes several."""

    part: str
    start: int
    stop: int

    def staged(self, staging: Path) -> Path:
        """The task's own file."""
        stem = self.part.removesuffix(".parquet").replace("/", "-")
        return staging / f"{stem}-{self.start:08d}-{self.stop:08d}.parquet"


def read_rows(prepared: Path, task: Task) -> pa.Table:
    """The task's rows of a prepared part: ids, and where each row came from."""
    columns = ["row_id", "source", "row_number", *ID_COLUMNS]
    return pq.read_table(prepared / task.part, columns=columns, partitioning=None).slice(task.start, task.stop - task.start)


def write_scores(path: Path, row_ids: pa.ChunkedArray, logps: Sequence[tuple[Any, Any]], forwards: int) -> None:
    """Write scores, row for row, and how many forwards they took. Raises OSError."""
    columns = {"row_id": row_ids}
    for place, name in enumerate(LOGPS):
        values = [pair[place] for pair in logps]
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
        flat = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32)
        columns[name] = pa.ListArray.from_arrays(offsets, flat)
    write_table(_with_forwards(pa.table(columns), forwards), path)


def _with_forwards(table: pa.Table, forwards: int) -> pa.Table:
    return table.replace_schema_metadata({SUMMARY: json.dumps({"forwards": forwards}).encode()})


def forwards_of(path: Path) -> int:
    """How many forwards the scores in a file took."""
    return json.loads(pq.read_metadata(path).metadata[SUMMARY])["forwards"]


def part_rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer."""
    return pq.read_metadata(path).num_rows


def join_part(prepared: Path, folder: Path, staging: Path, tasks: Sequence[Task]) -> None:
    """Join the tasks of one part, in order, into the part; their own files go. Raises OSError.

    Raises:
        UserError: for a staged file that doesn't hold what its task was to compute.
    """
    files = [task.staged(staging) for task in tasks]
    tables = [_read(file) for file in files]
    witness = pq.read_table(prepared / tasks[0].part, columns=_WITNESS, partitioning=None)
    for task, file, table in zip(tasks, files, tables, strict=True):
        _check(table, witness.slice(task.start, task.stop - task.start), file)
    forwards = sum(forwards_of(file) for file in files)
    whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    write_table(_with_forwards(whole, forwards), folder / tasks[0].part)
    for file in files:
        file.unlink()


def check_part(prepared: Path, folder: Path, part: str) -> None:
    """Check that a part that an earlier run has left holds the scores of the prepared rows.

    Raises:
        UserError: saying what it holds instead.
    """
    _check(_read(folder / part), pq.read_table(prepared / part, columns=_WITNESS, partitioning=None), folder / part)


def _read(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file, partitioning=None)
        forwards_of(file)
        return table.select(["row_id", *LOGPS])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} can't be read as scores ({error}); {RECOMPUTE}") from error


def _check(scores: pa.Table, rows: pa.Table, file: Path) -> None:
    import pyarrow.compute as pc

    if not np.array_equal(scores["row_id"].to_numpy(), rows["row_id"].to_numpy()):
        raise UserError(f"{file} holds the scores of other rows than the prepared ones; {RECOMPUTE}")
    for name, length in zip(LOGPS, ("chosen_length", "rejected_length"), strict=True):
        if not np.array_equal(pc.list_value_length(scores[name]).to_numpy(), rows[length].to_numpy()):
            raise UserError(f"{file}: {name} has not one value per token of the prepared rows; {RECOMPUTE}")
