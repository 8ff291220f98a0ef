"""Columns of rows in Parquet: complete or absent, named by what decides their bytes, computed once.

They lie in `columns/` beside the scores, in the parts of the prepared store and in their order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.config import RunConfig
from pipeline.data.fingerprint import digest
from pipeline.data.store import EVAL, MANIFEST, TRAIN, Prepared
from pipeline.data.transforms.control import end_tokens
from pipeline.errors import UserError
from pipeline.inspection.contents import ContentJob, sample_openings, sketch_part, write_contents
from pipeline.inspection.measures import MeasureJob, measure_part
from pipeline.inspection.parts import parts_of, read_part
from pipeline.io.atomic import write_json
from pipeline.io.digests import as_written, damage
from pipeline.ray.session import init_ray
from pipeline.ray.tasks import Executor, Work, run_here, run_on_ray, write_error
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.reference import Scores

__all__ = ["RowColumns", "column_folder", "compute", "content_columns", "executor_for", "measure_columns", "measures_folder"]

FORMAT_VERSION = 1
"""Incremented whenever the same inputs would give other bytes."""
ON_RAY_FROM = 20_000
"""Rows from which the tasks run on Ray: below, starting it takes longer."""


@dataclass(frozen=True)
class RowColumns:
    """Columns of every row of a prepared store, of one group. Each part has `row_id` first."""

    path: Path
    fingerprint: str
    parts: dict[str, int]
    """Part -> number of rows, train before eval."""

    def read(self, split: str = TRAIN, columns: Sequence[str] = ()) -> pa.Table:
        """Read columns of a split, all of them by default, in the order of the prepared rows."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert split in (TRAIN, EVAL), split
        parts = [part for part in self.parts if part.startswith(f"{split}/")]
        names = [list(columns) or pq.read_schema(self.path / part).names for part in parts]
        tables = [read_part(self.path, part, wanted) for part, wanted in zip(parts, names, strict=True)]
        return pa.concat_tables(tables) if tables else pa.table({})


def column_folder(prepared: Prepared) -> Path:
    """Return the folder of the columns of all stores beside this one."""
    return prepared.path.parent / "columns"


def measures_folder(prepared: Prepared, scores: str | None) -> Path:
    """Return the folder of the `measures` of a store and of scores with this fingerprint, whether it exists or not."""
    return column_folder(prepared) / digest(_measure_inputs(prepared, scores))


def _measure_inputs(prepared: Prepared, scores: str | None) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "prepared": prepared.fingerprint, "group": "measures", "scores": scores}


def measure_columns(cfg: RunConfig, prepared: Prepared, scores: Scores | None, executor: Executor | None = None) -> RowColumns:
    """Compute or open the columns of each row by itself (`measures`); those of scores only with `scores`.

    Raises:
        UserError: when they can't be written.
    """
    parts = parts_of(prepared)
    inputs = _measure_inputs(prepared, scores.fingerprint if scores is not None else None)

    def write(folder: Path, run: Runner) -> None:
        run(measure_part, MeasureJob(prepared, scores, folder, tuple(parts)))

    return compute(cfg, prepared, inputs, write, executor)


def content_columns(cfg: RunConfig, prepared: Prepared, executor: Executor | None = None) -> RowColumns:
    """Compute or open the columns of each row among all rows (`contents`).

    Raises:
        UserError: when they can't be written, or the tokenizer can't be loaded.
    """
    parts, tokenizer = parts_of(prepared), load_tokenizer(cfg)
    ends = tuple(sorted(tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer)))))

    def write(folder: Path, run: Runner) -> None:
        # A folder of this process: another one that computes the same deletes its own when it is done.
        staging = folder / f"staging-{uuid4().hex[:8]}"
        try:
            job = ContentJob(prepared, sample_openings(prepared, parts), ends, staging, parts)
            run(sketch_part, job)
            write_contents(job, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    return compute(cfg, prepared, {"group": "contents", "ends": list(ends)}, write, executor)


Runner = Callable[[Work, Any], None]
"""Runs `work(job, index)` for every part."""


def compute(
    cfg: RunConfig,
    prepared: Prepared,
    inputs: dict[str, Any],
    write: Callable[[Path, Runner], None],
    executor: Executor | None = None,
) -> RowColumns:
    """Open the columns that `inputs` name, or let `write` write them and complete them by a manifest.

    Raises:
        UserError: when they can't be written.
    """
    parts = parts_of(prepared)
    whole = {"format_version": FORMAT_VERSION, "prepared": prepared.fingerprint, **inputs}
    folder = column_folder(prepared) / digest(whole)
    if not _is_complete(folder, parts):
        run_tasks = executor or executor_for(cfg, sum(parts.values()))

        def run(work: Work, job: Any) -> None:
            for _ in run_tasks(work, job, len(parts), cfg.dataset_num_proc):
                pass

        # Without a lock: two processes write the same bytes, each file atomically, and the manifest last.
        try:
            write(folder, run)
            files = [{"file": part, "rows": rows, **as_written(folder / part)} for part, rows in parts.items()]
            write_json({"inputs": whole, "files": files}, folder / MANIFEST)
        except OSError as error:
            raise UserError(write_error(error)) from error
    return RowColumns(folder, digest(whole), parts)


def executor_for(cfg: RunConfig, rows: int) -> Executor:
    """Return what runs the tasks of so many rows: Ray Data, or this process for few."""
    if rows < ON_RAY_FROM:
        return run_here
    init_ray(cfg)
    return run_on_ray


def _is_complete(folder: Path, parts: dict[str, int]) -> bool:
    """Return whether the folder holds these parts as they were written; damaged ones are computed again."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {entry["file"]: entry for entry in manifest["files"]}
        return files.keys() == parts.keys() and not any(damage(folder / part, files[part]) for part in parts)
    except (OSError, ValueError, KeyError, TypeError):
        return False
