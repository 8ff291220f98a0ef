"""Columns of rows in Parquet: complete or absent, named by what decides their bytes, computed once.

They lie in `columns/` beside the scores, in the parts of the prepared store and in their order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.config import RunConfig
from pipeline.data.fingerprint import digest
from pipeline.data.store import EVAL, MANIFEST, TRAIN, Prepared, prepared_root
from pipeline.data.transforms.control import blank_tokens, end_tokens
from pipeline.errors import UserError
from pipeline.inspection.contents import ContentJob, sample_openings, sketch_part, write_contents
from pipeline.inspection.measures import MeasureJob, measure_part
from pipeline.inspection.parts import parts_of
from pipeline.io.storage import Folder, Location
from pipeline.ray.session import init_ray
from pipeline.ray.tasks import Executor, Work, run_here, run_on_ray, write_error
from strategies.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.reference import Scores

__all__ = [
    "Entries",
    "RowColumns",
    "Runner",
    "column_root",
    "compute",
    "content_columns",
    "executor_for",
    "measure_columns",
    "measures_folder",
]

FORMAT_VERSION = 2
"""Incremented whenever the same inputs would give other bytes."""
ON_RAY_FROM = 20_000
"""Rows from which the tasks run on Ray: below, starting it takes longer."""


@dataclass(frozen=True)
class RowColumns:
    """Columns of every row of a prepared store, of one group. Each part has `row_id` first."""

    path: Location
    fingerprint: str
    parts: dict[str, int]
    """Part -> number of rows, train before eval."""
    folder: Folder = field(repr=False, compare=False)
    """By which `path` is read, also by the workers that it is sent to."""

    def read(self, split: str = TRAIN, columns: Sequence[str] = ()) -> pa.Table:
        """Read columns of a split, all of them by default, in the order of the prepared rows."""
        import pyarrow as pa

        assert split in (TRAIN, EVAL), split
        parts = [part for part in self.parts if part.startswith(f"{split}/")]
        tables = [self.folder.read_table(part, list(columns) or None) for part in parts]
        return pa.concat_tables(tables) if tables else pa.table({})


def column_root(cfg: RunConfig) -> Folder:
    """Return the folder of the columns of all stores of `dataset_prepared_path`. Raises as `prepared_root`."""
    return prepared_root(cfg.dataset_prepared_path).subfolder("columns")


def measures_folder(cfg: RunConfig, prepared: Prepared, scores: str | None) -> Folder:
    """Return the folder of the `measures` of a store and of scores with this fingerprint, whether it exists or not."""
    return column_root(cfg).subfolder(digest(_measure_inputs(prepared, scores)))


def _measure_inputs(prepared: Prepared, scores: str | None) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "prepared": prepared.fingerprint, "group": "measures", "scores": scores}


def measure_columns(cfg: RunConfig, prepared: Prepared, scores: Scores | None, executor: Executor | None = None) -> RowColumns:
    """Compute or open the columns of each row by itself (`measures`); those of scores only with `scores`.

    Raises:
        UserError: when they can't be written.
    """
    parts = parts_of(prepared)
    inputs = _measure_inputs(prepared, scores.fingerprint if scores is not None else None)

    def write(folder: Folder, run: Runner) -> Entries:
        return run(measure_part, MeasureJob(prepared, scores, folder, tuple(parts)))

    return compute(cfg, prepared, inputs, write, executor)


def content_columns(cfg: RunConfig, prepared: Prepared, executor: Executor | None = None) -> RowColumns:
    """Compute or open the columns of each row among all rows (`contents`).

    Raises:
        UserError: when they can't be written, or the tokenizer can't be loaded.
    """
    parts, tokenizer = parts_of(prepared), load_tokenizer(cfg)
    ends = tuple(sorted(tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer)))))

    def write(folder: Folder, run: Runner) -> Entries:
        # A folder of this process: another one that computes the same deletes its own when it is done.
        staging = f"staging-{uuid4().hex[:8]}"
        try:
            openings = sample_openings(prepared, parts)
            job = ContentJob(prepared, openings, ends, blank_tokens(tokenizer), folder.subfolder(staging), parts)
            run(sketch_part, job)
            return write_contents(job, folder)
        finally:
            folder.delete(staging)

    return compute(cfg, prepared, {"group": "contents", "ends": list(ends)}, write, executor)


Entries = dict[str, dict[str, Any]]
"""Part -> what a manifest says of its file."""
Runner = Callable[[Work, Any], Entries]
"""Runs `work(job, index)` for every part; each yields its `part`, and what a manifest says of what it wrote."""


def compute(
    cfg: RunConfig,
    prepared: Prepared,
    inputs: dict[str, Any],
    write: Callable[[Folder, Runner], Entries],
    executor: Executor | None = None,
) -> RowColumns:
    """Open the columns that `inputs` name, or let `write` write them and complete them by a manifest.

    Raises:
        UserError: when they can't be written.
    """
    parts = parts_of(prepared)
    whole = {"format_version": FORMAT_VERSION, "prepared": prepared.fingerprint, **inputs}
    folder = column_root(cfg).subfolder(digest(whole)).carried()
    if not _is_complete(folder, parts):
        run_tasks = executor or executor_for(cfg, sum(parts.values()))

        def run(work: Work, job: Any) -> Entries:
            return {entry.pop("part"): entry for entry in run_tasks(work, job, len(parts), cfg.dataset_num_proc)}

        # Without a lease: two processes write the same bytes, each file atomically, and the manifest last.
        try:
            entries = write(folder, run)
            files = [{"file": part, "rows": rows, **entries[part]} for part, rows in parts.items()]
            folder.write_json(MANIFEST, {"inputs": whole, "files": files})
        except OSError as error:
            raise UserError(write_error(error, str(folder.where))) from error
    return RowColumns(folder.where, digest(whole), parts, folder)


def executor_for(cfg: RunConfig, rows: int) -> Executor:
    """Return what runs the tasks of so many rows: Ray Data, or this process for few."""
    if rows < ON_RAY_FROM:
        return run_here
    init_ray(cfg)
    return run_on_ray


def _is_complete(folder: Folder, parts: dict[str, int]) -> bool:
    """Return whether the folder holds these parts as they were written; damaged ones are computed again."""
    try:
        manifest = json.loads(folder.read(MANIFEST) or "")
        files = {entry["file"]: entry for entry in manifest["files"]}
        sizes = None if folder.is_local else folder.files()
        return files.keys() == parts.keys() and not any(folder.damage(files[part], sizes) for part in parts)
    except (OSError, ValueError, KeyError, TypeError):
        return False
