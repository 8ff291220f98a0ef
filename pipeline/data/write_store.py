"""Writing of the store from staged parts: train, eval and rejected files, and the manifest's counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.columns import STAGED_ONLY
from pipeline.data.notes import Tally
from pipeline.data.pictures import IMAGES
from pipeline.data.row_kinds import COMPLETIONS
from pipeline.data.split import DUPLICATE, TO_EVAL, TO_TRAIN
from pipeline.data.staged_parts import STAGING, rejected_of
from pipeline.data.store import EVAL, REJECTED, TRAIN
from pipeline.errors import UserError
from pipeline.io.storage import Folder, Location, inside
from pipeline.io.threads import ahead
from strategies.types import BatchKind

__all__ = [
    "StagedRows",
    "WriteJob",
    "check_prompts",
    "check_rejected",
    "counts",
    "first_row_ids",
    "notes",
    "percentiles",
    "picture_names",
    "write_final",
    "write_rejected",
]

SPLITS = ((TRAIN, TO_TRAIN), (EVAL, TO_EVAL))
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass(frozen=True)
class StagedRows:
    """Columns of all staged rows, in order: shape (rows,). `lengths` has one array per id column."""

    hashes: NDArray[np.void]
    prompts: NDArray[np.void]
    part: NDArray[np.int32]
    numbers: NDArray[np.int64]
    """Row number in its file, from 1."""
    lengths: dict[str, NDArray[np.int32]]

    @classmethod
    def load(cls, staging: Folder, parts: list[dict[str, Any]], kind: BatchKind) -> StagedRows:
        names = ("prompt", *COMPLETIONS[kind])
        columns = ["hash", "prompt_hash", "row_number", *(f"{name}_length" for name in names)]
        tables = ahead(lambda part: staging.read_table(part["part"], columns), parts)
        # Without the metadata, which holds each part's summary and would be kept of the first part only.
        whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        return cls(
            _bytes(whole["hash"]),
            _bytes(whole["prompt_hash"]),
            # Row -> its part, since the columns of all parts are concatenated.
            np.repeat(np.arange(len(parts), dtype=np.int32), [part["rows"] for part in parts]),
            whole["row_number"].to_numpy(),
            {name: whole[f"{name}_length"].to_numpy() for name in names},
        )


def _bytes(column: pa.ChunkedArray) -> NDArray[np.void]:
    """Return a column of 16 bytes a row, of which Python's objects would take five times as many."""
    array = column.combine_chunks()
    # V16 compares and sorts bytes; numpy's `S16` would drop trailing zero bytes.
    return np.frombuffer(array.buffers()[1], "V16", len(array), 16 * array.offset)


@dataclass(frozen=True)
class WriteJob:
    """Settings of the tasks that write the store; by part, the split of its rows and the row_id of its file's first row.

    `has_pictures`: whether any row of the store has one, so that all its files have their column.
    """

    store: Folder
    parts: list[dict[str, Any]]
    destination: list[NDArray[np.uint8]]
    first_row_id: list[int]
    has_pictures: bool = False


def write_final(job: WriteJob, index: int) -> Iterator[dict[str, Any]]:
    """Write the train and eval rows of one staged part; yields an entry for each file. Raises OSError."""
    part = job.parts[index]
    # Row ids count over all sources, so they are known only once every file's rows have been counted.
    table = job.store.subfolder(STAGING).read_table(part["part"]).replace_schema_metadata(None)
    row_ids = pa.array(table["place"].to_numpy() + job.first_row_id[index], pa.int64())
    table = table.drop_columns(STAGED_ONLY).add_column(0, "row_id", row_ids)
    # Added here, not staged: it is the same for every row of a part.
    source = pa.array([part["source"]] * len(table), pa.string())
    table = table.add_column(table.column_names.index("row_number"), "source", source)
    table = _with_pictures(table) if job.has_pictures else table
    for split, code in SPLITS:
        chosen = job.destination[index] == code
        if chosen.any():
            # Numbered by staged part, so train and eval files of one part share a number, with gaps.
            name = f"{split}/part-{index:05d}.parquet"
            written = job.store.write_table(name, table.filter(pa.array(chosen)))
            yield {"file": name, "rows": int(chosen.sum()), **written}


def _with_pictures(table: pa.Table) -> pa.Table:
    """Return the table with a column of pictures, empty where the part has none."""
    if IMAGES in table.column_names:
        return table
    return table.append_column(IMAGES, pa.array([[]] * len(table), pa.list_(pa.string())))


def picture_names(staging: Folder, parts: list[dict[str, Any]], destination: list[NDArray[np.uint8]]) -> set[str]:
    """Return the names of the pictures of all rows that the store keeps."""
    names: set[str] = set()
    for part, split in zip(parts, destination, strict=True):
        if IMAGES in staging.column_names(part["part"]):
            kept = staging.read_table(part["part"], [IMAGES]).filter(pa.array(split != DUPLICATE))
            names.update(pc.list_flatten(kept[IMAGES]).unique().to_pylist())
    return names


def write_rejected(store: Folder, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy the rejected rows out of staging; returns an entry for each file. Raises OSError."""

    def copy(index: int) -> dict[str, Any]:
        name = f"{REJECTED}/part-{index:05d}.parquet"
        # Copied, not moved: a run that fails afterwards finds its staged parts complete.
        written = store.write_bytes(name, store.read_bytes(f"{STAGING}/{rejected_of(parts[index]['part'])}"))
        return {"file": name, "rows": parts[index]["rejected"], **written}

    return list(ahead(copy, [index for index, part in enumerate(parts) if part["rejected"]]))


def check_rejected(sources: Sequence[Mapping[str, Any]], limit: float, bad: list[dict[str, Any]], folder: Location) -> None:
    """Raise UserError when more than the fraction `limit` of all rows is bad; its message lists the first five.

    Args:
        sources: counts of rows that were `read` and `rejected`, by source or part.
        bad: bad rows, the first ones at least.
    """
    rejected, read = (sum(source[name] for source in sources) for name in ("rejected", "read"))
    if rejected <= limit * read:
        return
    bad = bad[:5]
    listed = "\n".join(f"  {row['source']} row {row['row_number']}: {row['reason']}" for row in bad)
    raise UserError(
        f"max_rejected_fraction: {rejected} of {read} rows are bad, more than {limit:g} allows; mend them, or allow more. "
        f"The first:\n{listed}\nAll of them, with their text, are in {inside(folder, REJECTED)}"
    )


def check_prompts(parts: list[dict[str, Any]]) -> None:
    """Raise UserError when some prompts go to the trainer as text and others as messages: no batch can hold both."""
    conversational, rows = sum(part["conversational"] for part in parts), sum(part["rows"] for part in parts)
    if 0 < conversational < rows:
        raise UserError(
            f"datasets: {conversational} of {rows} prompts are messages and the others are text, which can't stand in one "
            "batch; give the messages type: chat_template.default, which makes them text"
        )


def first_row_ids(parts: list[dict[str, Any]]) -> list[int]:
    """Return for each part the number of row ids used by the files before its own: one per raw row, two for a split pair."""
    ends: dict[tuple[int, int], int] = {}
    for part in parts:
        key = (part["dataset"], part["file"])
        # By file, not by dataset: row indices begin again in each file.
        ends[key] = max(ends.get(key, 0), part["end"])
    starts, total = {}, 0
    for key in sorted(ends):
        starts[key], total = total, total + ends[key]
    return [starts[part["dataset"], part["file"]] for part in parts]


def counts(
    paths: list[str], parts: list[dict[str, Any]], rows: StagedRows, destination: NDArray[np.uint8]
) -> list[dict[str, Any]]:
    """Count the rows of each dataset by outcome (`COUNTS` of the store), in order."""
    dataset_of_row = np.asarray([part["dataset"] for part in parts], dtype=np.int64)[rows.part]
    result = []
    for dataset, path in enumerate(paths):
        dataset_parts = [part for part in parts if part["dataset"] == dataset]
        entry: dict[str, Any] = {"path": path}
        entry |= {name: sum(part[name] for part in dataset_parts) for name in ("read", "rejected", "too_long", "truncated")}
        for name, code in (("duplicates", DUPLICATE), (TRAIN, TO_TRAIN), (EVAL, TO_EVAL)):
            entry[name] = int(((dataset_of_row == dataset) & (destination == code)).sum())
        result.append(entry)
    return result


def notes(parts: list[dict[str, Any]], rows: StagedRows, destination: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Merge the notes of all parts, each kind and detail once, and add those that concern the split."""
    tally = Tally()
    for part in parts:
        tally.merge(part["notes"])
    trained, evaluated = (rows.prompts[destination == code] for _, code in SPLITS)
    if (shared := np.isin(evaluated, trained)).any():
        # `shared` counts within the evaluation rows; this is its index among all rows.
        index = np.flatnonzero(destination == dict(SPLITS)[EVAL])[np.flatnonzero(shared)[0]]
        example = {"source": parts[rows.part[index]]["source"], "row_number": int(rows.numbers[index]), "text": ""}
        tally.merge([{"kind": "prompt_in_training", "detail": "", "rows": int(shared.sum()), "example": example}])
    return tally.entries()


def percentiles(rows: StagedRows, destination: NDArray[np.uint8]) -> dict[str, dict[str, int]]:
    """Return percentiles of token counts of the kept rows, for each column and for the whole row."""
    kept = destination != DUPLICATE
    lengths = {name: values[kept] for name, values in rows.lengths.items()}
    lengths["total"] = np.sum(list(lengths.values()), axis=0)
    return {
        # "lower" gives a length that occurs, where interpolation would give a fraction of a token.
        name: {label: int(np.percentile(values, q, method="lower")) for label, q in PERCENTILES.items()}
        for name, values in lengths.items()
    }
