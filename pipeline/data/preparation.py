"""Stage 1 as a whole: config in, complete store out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.secrets import redact_text
from pipeline.data import finalise
from pipeline.data.decide import decide
from pipeline.data.engine import Executor, run_on_ray, write_error
from pipeline.data.files import write_json
from pipeline.data.plan import Plan, make_plan
from pipeline.data.staging import Job, stage_shard
from pipeline.data.store import MANIFEST, Prepared, open_store
from pipeline.errors import UserError
from pipeline.patience import waiting_for
from strategies.plugins import Plugins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PART_ROWS", "prepare"]

PART_ROWS = 2000
"""Raw rows per part: the grain of resuming, of memory, and of parallel work."""

Progress = Callable[[dict[str, Any]], None]


def prepare(
    cfg: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    rows_per_part: int = PART_ROWS,
    executor: Executor | None = None,
) -> Prepared:
    """Prepare the data of `cfg`, or open the store when it is there already (then Ray is not touched).

    A killed run is continued where it stopped; of two runs that want the same store one waits for the other.

    Args:
        cfg: the recipe.
        tokenizer: the recipe's when None.
        progress: called after every part with `{"stage", "rows_done", "rows_total", "parts_done", "parts_total"}`, totals None
            while unknown.
        rows_per_part: raw rows per staged part.
        executor: runs the tasks; Ray Data when None, on the Ray that this starts or joins.

    Raises:
        UserError: for a bad dataset, bad rows beyond `max_rejected_fraction`, no rows left, an unwritable folder, a full disk.
    """
    from filelock import FileLock

    tokenizer = tokenizer or _load_tokenizer(cfg)
    plan = make_plan(cfg, tokenizer, rows_per_part)
    root = Path(os.path.expanduser(cfg.dataset_prepared_path)).absolute()
    folder = root / plan.fingerprint
    if (store := open_store(folder)) is not None:
        return store
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{plan.fingerprint}.lock")
        with waiting_for("another process, which prepares the same data"):
            held = lock.acquire()
        with held:
            return open_store(folder) or _build(cfg, plan, tokenizer, folder, progress, rows_per_part, executor)
    except OSError as error:
        raise UserError(write_error(error)) from error


def _load_tokenizer(cfg: Any) -> PreTrainedTokenizerBase:
    from strategies.tokenizer import load_tokenizer

    try:
        return load_tokenizer(cfg)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build(
    cfg: Any,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress | None,
    rows_per_part: int,
    executor: Executor | None,
) -> Prepared:
    staging = folder / "staging"
    staging.mkdir(parents=True, exist_ok=True)
    if not plan.shards:
        raise UserError(f"datasets: no rows in {', '.join(str(keys['path']) for keys in plan.datasets)}")
    run_tasks = executor or _default_executor(cfg)
    job = Job(
        rl=cfg.rl,
        tokenizer=tokenizer,
        datasets=plan.datasets,
        templates=plan.templates,
        shards=plan.shards,
        sequence_len=plan.inputs["sequence_len"],
        excess_length_strategy=plan.inputs["excess_length_strategy"],
        rows_per_part=rows_per_part,
        folder=staging,
        plugins=Plugins.of(cfg),
        encode_special_tokens=cfg.encode_special_tokens,
    )
    parts = _stage(job, plan, run_tasks, cfg.dataset_num_proc, progress)
    files = finalise.write_rejected(staging, folder, parts)
    finalise.check_rejected(parts, cfg.max_rejected_fraction, folder)
    finalise.check_prompts(parts)
    _finish(cfg, plan, folder, parts, files, run_tasks)
    shutil.rmtree(staging)
    store = open_store(folder)
    assert store is not None
    return store


def _default_executor(cfg: Any) -> Executor:
    from pipeline.session import connect

    connect(cfg)
    return run_on_ray


def _stage(job: Job, plan: Plan, run_tasks: Executor, num_proc: int | None, progress: Progress | None) -> list[dict[str, Any]]:
    """Summaries of all parts, in the order of the sources."""
    parts, rows = [], 0
    known = plan.rows is not None
    total = sum(len(_starts(shard, job.rows_per_part)) for shard in job.shards) if known else None
    for part in run_tasks(_work, job, len(job.shards), num_proc):
        parts.append(part)
        rows += part["read"]
        if progress is not None:
            done = {"rows_done": rows, "rows_total": plan.rows, "parts_done": len(parts), "parts_total": total}
            progress({"stage": "prepare", **done})
    if not rows:
        raise UserError(f"datasets: no rows in {', '.join(str(keys['path']) for keys in plan.datasets)}")
    if missing := next((part["part"] for part in parts if not (job.folder / part["part"]).exists()), None):
        raise UserError(
            f"dataset_prepared_path: another node wrote {missing}, and it is not in {job.folder} here; "
            "the folder must be on storage that all nodes share"
        )
    return sorted(parts, key=lambda part: part["part"])


def _starts(shard: Any, rows_per_part: int) -> range:
    return range(shard.start // rows_per_part, -(-shard.stop // rows_per_part))


def _work(job: Job, index: int) -> Iterator[dict[str, Any]]:
    return stage_shard(job, job.shards[index])


def _finish(
    cfg: Any,
    plan: Plan,
    folder: Path,
    parts: list[dict[str, Any]],
    files: list[dict[str, Any]],
    run_tasks: Executor,
) -> None:
    """Write train, eval, and, when all else is in place, the manifest."""
    staging, inputs = folder / "staging", plan.inputs
    rows = finalise.StagedRows.load(staging, parts, plan.kind)
    is_test = np.asarray([part["dataset"] >= plan.test_from for part in parts])[rows.part]
    if not (~is_test).any():
        raise UserError(
            f"datasets: none of {sum(part['read'] for part in parts)} rows is left to train on "
            f"({sum(part['too_long'] for part in parts)} have more than sequence_len {inputs['sequence_len']} tokens, "
            f"{sum(part['rejected'] for part in parts)} are bad)"
        )
    dedup, seed = inputs["dataset_exact_deduplication"], inputs["seed"] or 0
    destination = decide(rows.hashes, rows.prompts, is_test, dedup, plan.val_set_size, seed)
    by_part = np.split(destination, np.cumsum([part["rows"] for part in parts])[:-1])
    final = finalise.Final(staging, folder, parts, by_part, finalise.first_row_ids(parts))
    files = files + list(run_tasks(finalise.write_final, final, len(parts), cfg.dataset_num_proc))
    manifest = {
        "fingerprint": plan.fingerprint,
        "format_version": inputs["format_version"],
        "kind": plan.kind,
        "sources": finalise.counts([redact_text(str(keys["path"])) for keys in plan.datasets], parts, rows, destination),
        "lengths": finalise.percentiles(rows, destination),
        "notes": finalise.notes(parts),
        "files": sorted(files, key=lambda entry: entry["file"]),
        "inputs": inputs,
    }
    write_json(manifest, folder / MANIFEST)
