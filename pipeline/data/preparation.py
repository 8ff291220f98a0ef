"""Preparation of a config's data: from raw datasets to a complete store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data import write_store
from pipeline.data.fingerprint import digest
from pipeline.data.job import Job
from pipeline.data.keys import DataConfig
from pipeline.data.pictures import list_pictures
from pipeline.data.plan import Plan, make_plan, remember_day
from pipeline.data.process_shard import stage_shard
from pipeline.data.split import decide
from pipeline.data.staged_parts import STAGING, part_names
from pipeline.data.store import CHECKSUM, MANIFEST, REJECTED, Prepared, check_root, checksum, open_store, prepared_root
from pipeline.errors import UserError
from pipeline.io.lease import Holder, Lease, held
from pipeline.io.remote_models import fetch_models
from pipeline.io.storage import Folder
from pipeline.ray.session import init_ray
from pipeline.ray.tasks import Executor, run_on_ray, write_error
from pipeline.secrets import redact_text
from strategies.models.processor import processor_or_reason
from strategies.models.tokenizer import shared_tokenizer
from strategies.plugins import Plugins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["PART_ROWS", "find_prepared", "prepare"]

PART_ROWS = 2000
"""Raw rows per part: the unit of resumption, memory use and parallelism."""

Progress = Callable[[dict[str, Any]], None]


def prepare(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
    rows_per_part: int = PART_ROWS,
    executor: Executor | None = None,
    processor: ProcessorMixin | None = None,
) -> Prepared:
    """Prepare the data of `cfg`, or open the store if it is cached (then Ray is not started).

    A killed run resumes where it stopped; when two runs prepare the same store, one waits for the other.

    Args:
        cfg: the recipe.
        tokenizer: the recipe's tokenizer, and its processor of pictures if its model has one, when None.
        progress: called after every part with `{"stage", "rows_done", "rows_total", "parts_done", "parts_total"}`, totals None
            while unknown; and with `"waiting"`, the name of another process, before this one waits for it.
        rows_per_part: raw rows per staged part.
        executor: runs the tasks; Ray Data when None, on a Ray cluster that is started or joined.
        processor: with a tokenizer, the processor of pictures.

    Raises:
        UserError: for a bad dataset, bad rows beyond `max_rejected_fraction`, no rows left, an unwritable folder, a full disk.
    """
    root = check_root(cfg.dataset_prepared_path)
    why_text_alone = None
    if tokenizer is None:
        tokenizer, processor, why_text_alone = _load(cfg)
    plan = make_plan(cfg, tokenizer, rows_per_part, processor)
    if (store := open_store(root.subfolder(plan.fingerprint))) is not None:
        return _within_limits(store, cfg)
    # From here on a store that doesn't answer is waited for.
    folder = root.subfolder(plan.fingerprint).carried()
    try:
        # The lease lies beside the store's folder, not in it: to delete the folder must not delete a lease that is held.
        with held(root, f"{plan.fingerprint}.lease", partial(_show_wait, progress)) as lease:
            # Another process may have finished the store while this one waited for it.
            if (store := open_store(folder)) is not None:
                return _within_limits(store, cfg)
            if plan.day is not None:
                # Before any row is rendered: a killed preparation that is resumed on a later day finds its parts again.
                remember_day(cfg, root, digest(plan.undated), plan.day)
            return _build(cfg, plan, tokenizer, folder, progress, rows_per_part, executor, why_text_alone, lease)
    except OSError as error:
        raise UserError(write_error(error, str(folder.where))) from error


def find_prepared(cfg: DataConfig) -> Prepared | None:
    """Return the cached store of `cfg` without verifying its files; None without one. Raises UserError for a bad dataset."""
    root = prepared_root(cfg.dataset_prepared_path)
    # Without any store there is no need to load the tokenizer and to hash the sources.
    if not any(root.exists(f"{name}/{MANIFEST}") for name in root.names()):
        return None
    tokenizer, processor, _ = _load(cfg)
    plan = make_plan(cfg, tokenizer, PART_ROWS, processor)
    return open_store(root.subfolder(plan.fingerprint), verify=False)


def _show_wait(progress: Progress | None, holder: Holder) -> None:
    if progress is not None:
        progress({"stage": "prepare", "waiting": str(holder), "rows_done": 0, "rows_total": None})


def _within_limits(store: Prepared, cfg: DataConfig) -> Prepared:
    """Return the store; raise UserError if more of its rows are bad than this recipe allows."""
    if store.rejected_rows:
        # `max_rejected_fraction` isn't in the fingerprint, so a cached store is checked against this recipe's.
        bad = store.read(REJECTED, ["source", "row_number", "reason"]).slice(0, 5).to_pylist()
        write_store.check_rejected(store.manifest["sources"], cfg.max_rejected_fraction, bad, store.path)
    return store


def _load(cfg: DataConfig) -> tuple[PreTrainedTokenizerBase, ProcessorMixin | None, str | None]:
    """Load the recipe's tokenizer, and its processor of pictures; of a vision-language model without one, return the reason."""
    fetch_models(cfg)
    try:
        tokenizer = shared_tokenizer(cfg)
        return tokenizer, *processor_or_reason(cfg, tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error


def _build(
    cfg: DataConfig,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Folder,
    progress: Progress | None,
    rows_per_part: int,
    executor: Executor | None,
    why_text_alone: str | None,
    lease: Lease,
) -> Prepared:
    """Build the store. `why_text_alone` says why a vision-language model takes no pictures here."""
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
        store=folder,
        plugins=Plugins.of(cfg),
        encode_special_tokens=cfg.encode_special_tokens,
        day=plan.day,
        processor=plan.processor,
        placeholders=plan.placeholders,
    )
    parts = _stage(job, plan, run_tasks, cfg.dataset_num_proc, progress, lease)
    # Before the check, whose message names the folder of the rejected rows.
    files = write_store.write_rejected(folder, parts)
    bad = [row for part in parts for row in part["first_bad"]]
    try:
        write_store.check_rejected(parts, cfg.max_rejected_fraction, bad, folder.where)
        write_store.check_prompts(parts)
        _finish(cfg, plan, folder, parts, files, run_tasks, lease)
    except UserError as error:
        # Rows with pictures are rejected as for a text model, which doesn't say why this one takes none.
        if bad and why_text_alone is not None:
            raise UserError(f"{error}\n{why_text_alone}") from error
        raise
    # After the manifest: a process killed in between leaves a complete store with some superfluous files.
    folder.delete(STAGING)
    store = open_store(folder, verify=False)  # each file was hashed when it was written
    assert store is not None
    return store


def _default_executor(cfg: DataConfig) -> Executor:
    init_ray(cfg)
    return run_on_ray


def _stage(
    job: Job, plan: Plan, run_tasks: Executor, num_proc: int | None, progress: Progress | None, lease: Lease
) -> list[dict[str, Any]]:
    """Process all shards; return the summaries of all parts in the order of the sources."""
    parts, rows = [], 0
    is_known = plan.rows is not None
    total = sum(len(part_names(shard, job.rows_per_part)) for shard in job.shards) if is_known else None
    for part in run_tasks(_stage_one, job, len(job.shards), num_proc):
        lease.check()
        parts.append(part)
        rows += part["read"]
        if progress is not None:
            done = {"rows_done": rows, "rows_total": plan.rows, "parts_done": len(parts), "parts_total": total}
            progress({"stage": "prepare", **done})
    if not rows:
        raise UserError(f"datasets: no rows in {', '.join(str(keys['path']) for keys in plan.datasets)}")
    # Checked here, where a missing file has a known cause; later it would only fail to open.
    here = job.staging.files()
    if missing := next((part["part"] for part in parts if part["part"] not in here), None):
        raise UserError(
            f"dataset_prepared_path: another node wrote {missing}, and it is not in {job.staging.where} here; "
            "give a URI such as s3://bucket/prepared, or a path on storage that all nodes share"
        )
    # Tasks end in any order; the store's may not depend on it.
    return sorted(parts, key=lambda part: part["part"])


def _stage_one(job: Job, index: int) -> Iterator[dict[str, Any]]:
    return stage_shard(job, job.shards[index])


def _first_reason(parts: list[dict[str, Any]]) -> str:
    """Return the first bad row's reason as a phrase; "" without one."""
    return next((f": {row['reason']}" for part in parts for row in part["first_bad"]), "")


def _finish(
    cfg: DataConfig,
    plan: Plan,
    folder: Folder,
    parts: list[dict[str, Any]],
    files: list[dict[str, Any]],
    run_tasks: Executor,
    lease: Lease,
) -> None:
    """Write train and eval files and, last, the manifest, which marks the store as complete."""
    staging, inputs = folder.subfolder(STAGING), plan.inputs
    rows = write_store.StagedRows.load(staging, parts, plan.kind)
    is_test = np.asarray([part["dataset"] >= plan.test_from for part in parts])[rows.part]
    if not (~is_test).any():
        raise UserError(
            f"datasets: none of {sum(part['read'] for part in parts)} rows is left to train on "
            f"({sum(part['too_long'] for part in parts)} have more than sequence_len {inputs['sequence_len']} tokens, "
            f"{sum(part['rejected'] for part in parts)} are bad{_first_reason(parts)})"
        )
    # Deduplication and splitting need the hashes of all rows, so they follow after staging.
    dedup, seed = inputs["dataset_exact_deduplication"], inputs["seed"] or 0
    # By row, rows that are wholly equal still stay together: half of them in each split would be no evaluation.
    together = rows.hashes if inputs.get("split_by") == "row" else rows.prompts
    destination = decide(rows.hashes, together, is_test, dedup, plan.val_set_size, seed)
    # The last sum is the end of the array, where nothing is split.
    by_part = np.split(destination, np.cumsum([part["rows"] for part in parts])[:-1])
    names = write_store.picture_names(staging, parts, by_part) if plan.processor is not None else set()
    write_job = write_store.WriteJob(folder, parts, by_part, write_store.first_row_ids(parts), bool(names))
    # These write the same bytes on each attempt, and atomically, so a retried task does no harm.
    files = files + list(run_tasks(write_store.write_final, write_job, len(parts), cfg.dataset_num_proc))
    manifest = {
        "fingerprint": plan.fingerprint,
        "format_version": inputs["format_version"],
        "kind": plan.kind,
        # The manifest is printed and copied into reports.
        "sources": write_store.counts([redact_text(str(keys["path"])) for keys in plan.datasets], parts, rows, destination),
        "lengths": write_store.percentiles(rows, destination),
        "notes": write_store.notes(parts, rows, destination),
        "files": sorted(files, key=lambda entry: entry["file"]),
        "inputs": inputs,
        **({"pictures": len(names), "picture_list": list_pictures(folder, names)} if names else {}),
    }
    lease.check()
    folder.write_json(MANIFEST, {**manifest, CHECKSUM: checksum(manifest)})
