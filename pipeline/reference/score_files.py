"""Score files: those staged by tasks, and the part that is joined from them.

Columns of both: `row_id`; `ids`, the hash of the row's token ids and pictures (`hashing.row_hashes`), by which other scores
find it; `ref_chosen_logps`, `ref_rejected_logps` (list<float32>, one value per completion token); and with
`ray.score.hidden_states` also `ref_chosen_hidden`, `ref_rejected_hidden` (list<float16>, the mean last hidden state). The
footer holds the number of forwards and a digest of the content, by which a file is verified without a manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.io.digests import written
from pipeline.io.storage import Folder
from pipeline.io.tables import decoded
from pipeline.io.threads import ahead
from pipeline.reference.hashing import ROW_HASH_BYTES, add_lists, hashed_columns, row_hashes

if TYPE_CHECKING:
    from pipeline.data import Prepared

__all__ = [
    "HIDDEN",
    "LOGPS",
    "RECOMPUTE",
    "Task",
    "find_part",
    "is_reused",
    "join_part",
    "missing_rows",
    "read_prepared",
    "read_rows",
    "read_scores",
    "score_columns",
    "rows_of",
    "stage_existing",
    "staged_files",
    "write_scores",
]

LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
HIDDEN = ("ref_chosen_hidden", "ref_rejected_hidden")
RECOMPUTE = "compute the scores again with `prefray score RECIPE --recompute`"
SUMMARY = b"prefray"
REUSED = "-known-"
"""In the names of staged files with rows of other scores."""
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

    @classmethod
    def of(cls, part: str, rows: Sequence[int]) -> Task:
        """Return the task of these rows, ascending."""
        start, stop = rows[0], rows[-1] + 1
        # Indices are listed only where rows between them are missing: a task is sent as JSON.
        return cls(part, start, stop, () if len(rows) == stop - start else tuple(rows))

    def only(self, rows: set[int]) -> Task | None:
        """Return the task of those of its rows that are among `rows`; None where none is."""
        left = [row for row in self.rows or range(self.start, self.stop) if row in rows]
        return Task.of(self.part, left) if left else None

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows) or self.stop - self.start

    @property
    def staged(self) -> str:
        """Name of the task's file. It is unique: a row in a valid file is in no later task."""
        return f"{_stem(self.part)}-{self.start:08d}-{self.stop:08d}.parquet"


def _stem(part: str) -> str:
    return part.removesuffix(".parquet").replace("/", "-")


def read_rows(prepared: Prepared, part: str) -> pa.Table:
    """Read a prepared part's token ids, names of pictures where it has them, source and row number."""
    return prepared.read_part(part, ["row_id", "source", "row_number", *hashed_columns(prepared)])


def rows_of(task: Task, part: pa.Table) -> pa.Table:
    """Return the task's rows of its part."""
    return part.take(list(task.rows)) if task.rows else part.slice(task.start, task.stop - task.start)


def read_prepared(prepared: Prepared, part: str) -> pa.Table:
    """Read `row_id` and hash what every row of a prepared part is scored by: the first columns of its scores."""
    table = prepared.read_part(part, ["row_id", *hashed_columns(prepared)])
    return pa.table({"row_id": table["row_id"], "ids": row_hashes(table)})


def score_columns(table: pa.Table, hidden: bool = True) -> list[str]:
    """Return the columns of a table of scores that hold values of the reference; those of hidden states only with `hidden`."""
    return [name for name in (*LOGPS, *(HIDDEN if hidden else ())) if name in table.column_names]


def write_scores(
    folder: Folder,
    name: str,
    rows: pa.Table,
    logps: Sequence[tuple[Any, Any]],
    forwards: int,
    hidden: Sequence[tuple[Any, Any]] = (),
) -> None:
    """Write scores of `rows`, row for row, `hidden` states if they are kept, and the number of forwards. Raises OSError."""
    # Hashed by the actor from the ids that it scored, so `join_part` notices rows that were changed meanwhile.
    columns = {"row_id": rows["row_id"], "ids": row_hashes(rows)}
    for index, column in enumerate(LOGPS):
        columns[column] = _lists([pair[index] for pair in logps], np.float32)
    for index, column in enumerate(HIDDEN if hidden else ()):
        columns[column] = _lists([pair[index] for pair in hidden], np.float16)
    _write(folder, name, pa.table(columns), forwards)


def _lists(values: Sequence[Any], dtype: type[np.floating[Any]]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in values])]).astype(np.int32)
    # numpy can't concatenate nothing.
    return pa.ListArray.from_arrays(offsets, np.concatenate([np.zeros(0, dtype), *values]).astype(dtype))


def _write(folder: Folder, name: str, table: pa.Table, forwards: int) -> dict[str, Any]:
    # In the footer: a staged file has no manifest, and two files couldn't be written as one.
    summary = {"forwards": forwards, "sha256": _digest(table, forwards)}
    return folder.write_table(name, table.replace_schema_metadata({SUMMARY: json.dumps(summary).encode()}))


def _digest(table: pa.Table, forwards: int) -> str:
    digest = hashlib.sha256(str(forwards).encode())
    digest.update(table["row_id"].to_numpy().tobytes())
    digest.update(b"".join(table["ids"].to_pylist()))
    for name in score_columns(table):
        add_lists(digest, table[name])
    return digest.hexdigest()


def read_scores(folder: Folder, name: str) -> pa.Table | None:
    """Read a score file; None if it is missing, unreadable or fails its digest. Raises OSError where storage doesn't answer."""
    try:
        data = folder.read_bytes(name)
    except OSError as error:
        # What a disk can't read is lost; what a store doesn't answer may still be there.
        if folder.is_local or isinstance(error, FileNotFoundError):
            return None
        raise
    return _whole(data)


def _whole(data: bytes) -> pa.Table | None:
    try:
        table = decoded(data)
        summary = json.loads(table.schema.metadata[SUMMARY])
        # In this order, whatever the file's: the digest depends on it.
        table = table.select(["row_id", "ids", *LOGPS, *score_columns(table)[len(LOGPS) :]])
        is_valid = summary["sha256"] == _digest(table, summary["forwards"])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):  # ArrowException: corrupt pages raise any of its kind
        return None
    return table if is_valid else None


def forwards_of(table: pa.Table) -> int:
    """Return the number of forwards run for a score file, of `read_scores`; rows reused from other scores add none."""
    return json.loads(table.schema.metadata[SUMMARY])["forwards"]


def find_part(folder: Folder, part: str, rows: pa.Table) -> dict[str, Any] | None:
    """Return what a manifest says of a complete, undamaged part with the scores of exactly these rows, and its `forwards`."""
    if not folder.exists(part):
        return None
    data = folder.read_bytes(part)
    scores = _whole(data)
    if scores is None or not all(scores[name].equals(rows[name]) for name in rows.column_names):
        return None
    return {**written(data), "forwards": forwards_of(scores)}


def staged_files(staging: Folder, part: str) -> dict[str, pa.Table]:
    """Read the staged files of a part. Damaged ones are deleted, so that their rows are computed again."""
    names = sorted(name for name in staging.files() if re.fullmatch(rf"{re.escape(_stem(part))}-[^/]*\.parquet", name))
    tables = dict(zip(names, ahead(partial(read_scores, staging), names), strict=True))
    for name in (name for name, table in tables.items() if table is None):
        staging.delete(name)
    return {name: table for name, table in tables.items() if table is not None}


def stage_existing(staging: Folder, part: str, rows: pa.Table, existing: pa.Table) -> None:
    """Stage the rows (`row_id`, `ids`) of a part whose `ids` are in `existing`, other complete scores. Raises OSError."""
    table = _scores_of(rows.filter(pc.is_in(rows["ids"], value_set=existing["ids"])), existing)
    if len(table):
        # Named by its first row, as a task: no later copy has that row.
        first = pc.index_in(table["ids"].slice(0, 1), value_set=rows["ids"]).to_pylist()[0]
        _write(staging, f"{_stem(part)}{REUSED}{first:08d}.parquet", table, 0)


def is_reused(name: str) -> bool:
    """Return whether a staged file is of `stage_existing`."""
    return REUSED in name


def _scores_of(rows: pa.Table, existing: pa.Table) -> pa.Table:
    """Return `rows` joined with their scores on `ids`."""
    # The first match: rows with equal ids have equal scores.
    matches = existing.take(pc.index_in(rows["ids"], value_set=existing["ids"]))
    for name in score_columns(existing):
        rows = rows.append_column(name, matches[name])
    return rows


def join_part(folder: Folder, staging: Folder, part: str, rows: pa.Table) -> dict[str, Any]:
    """Join the staged files of a part in the order of `rows` (`row_id`, `ids`), then delete them; returns as `find_part`.

    Raises:
        UserError: when staged rows are missing or were changed; valid files stay.
        OSError: when the part can't be written.
    """
    staged = staged_files(staging, part)
    # Without the summaries, in which the files differ.
    tables = [table.replace_schema_metadata(None) for table in staged.values()]
    scores = pa.concat_tables(tables or [_SCHEMA.empty_table()])
    if missing := len(rows) - _count(pc.is_in(rows["ids"], value_set=scores["ids"])):
        raise UserError(
            f"{staging.where}: {missing} of {len(rows)} rows of {part} were changed since they were scored; run again"
        )
    forwards = sum(map(forwards_of, staged.values()))
    # The part is complete before its staged files are deleted: a process killed in between loses no row.
    entry = _write(folder, part, _scores_of(rows, scores), forwards)
    list(ahead(staging.delete, staged))
    return {**entry, "forwards": forwards}


def missing_rows(rows: pa.Table, tables: Iterable[pa.Table]) -> list[int]:
    """Return the indices of the rows whose `ids` are in none of the tables."""
    # With the type, since there may be no chunk to infer it from.
    existing = pa.chunked_array([chunk for table in tables for chunk in table["ids"].chunks], rows["ids"].type)
    return np.flatnonzero(~pc.is_in(rows["ids"], value_set=existing).to_numpy()).tolist()


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)
