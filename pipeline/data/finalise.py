"""From staged parts to the store: decide about every row, write train, eval and rejected files, then the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.columns import STAGED_ONLY
from pipeline.data.decide import DUPLICATE, TO_EVAL, TO_TRAIN
from pipeline.data.files import copy_file, write_table
from pipeline.data.kinds import COMPLETIONS
from pipeline.data.notes import Tally
from pipeline.data.store import EVAL, REJECTED, TRAIN
from pipeline.errors import UserError
from strategies.base import BatchKind

__all__ = [
    "Final",
    "StagedRows",
    "check_prompts",
    "check_rejected",
    "counts",
    "first_row_ids",
    "notes",
    "percentiles",
    "write_final",
    "write_rejected",
]

SPLITS = ((TRAIN, TO_TRAIN), (EVAL, TO_EVAL))
PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "max": 100}


@dataclass(frozen=True)
class StagedRows:
    """One entry per staged row, in order: shape (rows,). `lengths` has one array per id column."""

    hashes: NDArray[np.void]
    prompts: NDArray[np.void]
    part: NDArray[np.int32]
    lengths: dict[str, NDArray[np.int32]]

    @classmethod
    def load(cls, staging: Path, parts: list[dict[str, Any]], kind: BatchKind) -> StagedRows:
        names = ("prompt", *COMPLETIONS[kind])
        columns = ["hash", "prompt_hash", *(f"{name}_length" for name in names)]
        tables = [pq.read_table(staging / part["part"], columns=columns, partitioning=None) for part in parts]
        whole = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
        hashes, prompts = (np.frombuffer(b"".join(whole[name].to_pylist()), dtype="V16") for name in ("hash", "prompt_hash"))
        return cls(
            hashes,
            prompts,
            np.repeat(np.arange(len(parts), dtype=np.int32), [part["rows"] for part in parts]),
            {name: whole[f"{name}_length"].to_numpy() for name in names},
        )


@dataclass(frozen=True)
class Final:
    """What the writing tasks need: by part, where its rows go and the row_id of its file's first row."""

    staging: Path
    folder: Path
    parts: list[dict[str, Any]]
    destination: list[NDArray[np.uint8]]
    first_row_id: list[int]


def write_final(job: Final, index: int) -> Iterator[dict[str, Any]]:
    """Write one staged part's share of train and eval; yields what was written. Raises OSError."""
    part = job.parts[index]
    table = pq.read_table(job.staging / part["part"], partitioning=None).replace_schema_metadata(None)
    row_ids = pa.array(table["place"].to_numpy() + job.first_row_id[index], pa.int64())
    table = table.drop_columns(STAGED_ONLY).add_column(0, "row_id", row_ids)
    source = pa.array([part["source"]] * len(table), pa.string())
    table = table.add_column(table.column_names.index("row_number"), "source", source)
    for split, code in SPLITS:
        chosen = job.destination[index] == code
        if chosen.any():
            name = f"{split}/part-{index:05d}.parquet"
            write_table(table.filter(pa.array(chosen)), job.folder / name)
            yield {"file": name, "rows": int(chosen.sum())}


def write_rejected(staging: Path, folder: Path, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copy the rejected rows out of staging; returns the files. Raises OSError."""
    files = []
    for index, part in enumerate(parts):
        if part["rejected"]:
            name = f"{REJECTED}/part-{index:05d}.parquet"
            copy_file((staging / part["part"]).with_suffix(".rejected"), folder / name)
            files.append({"file": name, "rows": part["rejected"]})
    return files


def check_rejected(parts: list[dict[str, Any]], limit: float, folder: Path) -> None:
    """Raises UserError when more than the fraction `limit` of all rows is bad; it names the first five."""
    rejected, read = sum(part["rejected"] for part in parts), sum(part["read"] for part in parts)
    if rejected <= limit * read:
        return
    bad = [row for part in parts for row in part["first_bad"]][:5]
    listed = "\n".join(f"  {row['source']} row {row['row_number']}: {row['reason']}" for row in bad)
    raise UserError(
        f"max_rejected_fraction: {rejected} of {read} rows are bad, more than {limit:g} allows; mend them, or allow more. "
        f"The first:\n{listed}\nAll of them, with their text, are in {folder / REJECTED}"
    )


def check_prompts(parts: list[dict[str, Any]]) -> None:
    """Raises UserError when some prompts go to the trainer as text and others as messages: no batch can hold both."""
    conversational, rows = sum(part["conversational"] for part in parts), sum(part["rows"] for part in parts)
    if 0 < conversational < rows:
        raise UserError(
            f"datasets: {conversational} of {rows} prompts are messages and the others are text, which can't stand in one "
            "batch; give the messages type: chat_template.default, which makes them text"
        )


def first_row_ids(parts: list[dict[str, Any]]) -> list[int]:
    """For each part, how many places there are in the files before its own: one per raw row, two where pairs are split."""
    ends: dict[tuple[int, int], int] = {}
    for part in parts:
        key = (part["dataset"], part["file"])
        ends[key] = max(ends.get(key, 0), part["end"])
    starts, total = {}, 0
    for key in sorted(ends):
        starts[key], total = total, total + ends[key]
    return [starts[part["dataset"], part["file"]] for part in parts]


def counts(
    paths: list[str], parts: list[dict[str, Any]], rows: StagedRows, destination: NDArray[np.uint8]
) -> list[dict[str, Any]]:
    """What became of the rows of each dataset, in order."""
    dataset_of_row = np.asarray([part["dataset"] for part in parts], dtype=np.int64)[rows.part]
    result = []
    for dataset, path in enumerate(paths):
        own = [part for part in parts if part["dataset"] == dataset]
        entry: dict[str, Any] = {"path": path}
        entry |= {name: sum(part[name] for part in own) for name in ("read", "rejected", "too_long", "truncated")}
        for name, code in (("duplicates", DUPLICATE), (TRAIN, TO_TRAIN), (EVAL, TO_EVAL)):
            entry[name] = int(((dataset_of_row == dataset) & (destination == code)).sum())
        result.append(entry)
    return result


def notes(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is to be said of all rows together, each kind and detail once."""
    tally = Tally()
    for part in parts:
        tally.merge(part["notes"])
    return tally.entries()


def percentiles(rows: StagedRows, destination: NDArray[np.uint8]) -> dict[str, dict[str, int]]:
    """Tokens of the rows that were kept: of each column, and of the whole row."""
    kept = destination != DUPLICATE
    lengths = {name: values[kept] for name, values in rows.lengths.items()}
    lengths["total"] = np.sum(list(lengths.values()), axis=0)
    return {
        name: {label: int(np.percentile(values, q, method="lower")) for label, q in PERCENTILES.items()}
        for name, values in lengths.items()
    }
