"""Files of scores: what is staged of a part, and the part that is joined from it.

Columns of both: `row_id`; `ids`, the hash of the row's token ids (`hashing.row_hashes`), by which other scores find it; and
`ref_chosen_logps`, `ref_rejected_logps` (list<float32>, one value per completion token). The footer has the forwards that the
file took and a digest of all of it, so that a file without a manifest is known to be what was written, or not.
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

from pipeline.data.files import write_table
from pipeline.errors import UserError
from pipeline.reference.hashing import ID_COLUMNS, ROW_HASH_BYTES, add_lists, row_hashes

__all__ = [
    "LOGPS",
    "RECOMPUTE",
    "Task",
    "forwards_of",
    "join_part",
    "missing_rows",
    "read_prepared",
    "read_rows",
    "read_scores",
    "stage_known",
    "staged_files",
    "write_scores",
]

LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
RECOMPUTE = "compute the scores again with `prefray score RECIPE --recompute`"
SUMMARY = b"prefray"
_LIST = pa.list_(pa.field("element", pa.float32()))
_SCHEMA = pa.schema([("row_id", pa.int64()), ("ids", pa.binary(ROW_HASH_BYTES)), *((name, _LIST) for name in LOGPS)])


@dataclass(frozen=True)
class Task:
    """Rows `start` to `stop` of a part, such as `train/part-00000.parquet`; one forward of an actor takes several."""

    part: str
    start: int
    stop: int
    rows: tuple[int, ...] = ()
    """The rows themselves, ascending, where they aren't all from `start` to `stop`: the others are known."""

    @property
    def size(self) -> int:
        """How many rows it has."""
        return len(self.rows) or self.stop - self.start

    def staged(self, staging: Path) -> Path:
        """The task's own file. A row that a good file holds is in no later task, so `start` names the task."""
        return staging / f"{_stem(self.part)}-{self.start:08d}-{self.stop:08d}.parquet"


def _stem(part: str) -> str:
    return part.removesuffix(".parquet").replace("/", "-")


def read_rows(prepared: Path, task: Task) -> pa.Table:
    """The task's rows of a prepared part: ids, and where each row came from."""
    columns = ["row_id", "source", "row_number", *ID_COLUMNS]
    table = pq.read_table(prepared / task.part, columns=columns, partitioning=None)
    return table.take(list(task.rows)) if task.rows else table.slice(task.start, task.stop - task.start)


def read_prepared(prepared: Path, part: str) -> pa.Table:
    """`row_id` and `ids` of every row of a prepared part: what the part's scores are to begin with."""
    table = pq.read_table(prepared / part, columns=["row_id", *ID_COLUMNS], partitioning=None)
    return pa.table({"row_id": table["row_id"], "ids": row_hashes(table)})


def write_scores(path: Path, rows: pa.Table, logps: Sequence[tuple[Any, Any]], forwards: int) -> None:
    """Write scores of `rows`, row for row, and how many forwards they took. Raises OSError."""
    columns = {"row_id": rows["row_id"], "ids": row_hashes(rows)}
    for place, name in enumerate(LOGPS):
        values = [pair[place] for pair in logps]
        offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
        flat = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32)
        columns[name] = pa.ListArray.from_arrays(offsets, flat)
    _write(pa.table(columns), forwards, path)


def _write(table: pa.Table, forwards: int, path: Path) -> None:
    summary = {"forwards": forwards, "sha256": _digest(table, forwards)}
    write_table(table.replace_schema_metadata({SUMMARY: json.dumps(summary).encode()}), path)


def _digest(table: pa.Table, forwards: int) -> str:
    digest = hashlib.sha256(str(forwards).encode())
    digest.update(table["row_id"].to_numpy().tobytes())
    digest.update(b"".join(table["ids"].to_pylist()))
    for name in LOGPS:
        add_lists(digest, table[name])
    return digest.hexdigest()


def read_scores(path: Path) -> pa.Table | None:
    """The scores in a file; None where it isn't there, can't be read, or doesn't hold what was written."""
    try:
        table = pq.read_table(path, partitioning=None)
        summary = json.loads(table.schema.metadata[SUMMARY])
        table = table.select(["row_id", "ids", *LOGPS])
        good = summary["sha256"] == _digest(table, summary["forwards"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):  # ArrowException: corrupt pages raise any of its kind
        return None
    return table if good else None


def forwards_of(path: Path) -> int:
    """How many forwards were run for the scores in a file; rows that were copied from other scores add none."""
    return json.loads(pq.read_metadata(path).metadata[SUMMARY])["forwards"]


def staged_files(staging: Path, part: str) -> dict[Path, pa.Table]:
    """What is staged of a part; files that aren't what was written go, to be computed again."""
    found = {}
    for file in sorted(staging.glob(f"{_stem(part)}-*.parquet")):
        if (table := read_scores(file)) is not None:
            found[file] = table
        else:
            file.unlink()
    return found


def stage_known(staging: Path, part: str, rows: pa.Table, known: pa.Table) -> None:
    """Stage those of `rows` (`row_id`, `ids`) of a part whose ids are in `known`, the scores of others. Raises OSError."""
    table = _scores_of(rows.filter(pc.is_in(rows["ids"], value_set=known["ids"])), known)
    if len(table):
        # By its first row, as a task: a later copy doesn't have that row.
        first = pc.index_in(table["ids"].slice(0, 1), value_set=rows["ids"]).to_pylist()[0]
        _write(table, 0, staging / f"{_stem(part)}-known-{first:08d}.parquet")


def _scores_of(rows: pa.Table, known: pa.Table) -> pa.Table:
    """`rows` with their scores, by their ids."""
    found = known.take(pc.index_in(rows["ids"], value_set=known["ids"]))
    for name in LOGPS:
        rows = rows.append_column(name, found[name])
    return rows


def join_part(folder: Path, staging: Path, part: str, rows: pa.Table) -> None:
    """Join what is staged of a part into the part, in the order of `rows` (`row_id`, `ids`); the staged files go.

    Raises:
        UserError: when something of it is missing or was changed; what is good of it stays.
        OSError: when the part can't be written.
    """
    staged = staged_files(staging, part)
    tables = [table.replace_schema_metadata(None) for table in staged.values()]
    known = pa.concat_tables([_SCHEMA.empty_table(), *tables])
    if missing := len(rows) - _number(pc.is_in(rows["ids"], value_set=known["ids"])):
        raise UserError(f"{staging}: {missing} of {len(rows)} rows of {part} were changed since they were scored; run again")
    _write(_scores_of(rows, known), sum(forwards_of(file) for file in staged), folder / part)
    for file in staged:
        file.unlink()


def missing_rows(rows: pa.Table, tables: Iterable[pa.Table]) -> list[int]:
    """Places of the rows whose ids are in none of the tables."""
    known = pa.chunked_array([chunk for table in tables for chunk in table["ids"].chunks], rows["ids"].type)
    return np.flatnonzero(~pc.is_in(rows["ids"], value_set=known).to_numpy()).tolist()


def _number(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)
