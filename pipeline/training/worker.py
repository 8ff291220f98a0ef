"""Run one training worker inside Ray Train: load, build, train, save."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import ray.train
import torch
import transformers
from pyarrow import fs
from ray.train.collective import barrier, broadcast_from_rank_zero
from transformers import set_seed

from pipeline.config import RunConfig
from pipeline.data import Prepared
from pipeline.data.dates import dated, prints_date
from pipeline.data.pictures import IMAGES
from pipeline.data.store import EVAL, TRAIN
from pipeline.io.cache import NodeCache
from pipeline.io.retry import with_retries
from pipeline.io.storage import is_uri
from pipeline.runs.checkpoints import clean, complete
from pipeline.runs.export import SyncFoldersCallback, link_watched, put_model, watched_folders
from pipeline.runs.scratch import open_scratch, remove_scratch, scratch_of
from pipeline.training.events import StepReport
from pipeline.training.heartbeat import attach, beat
from pipeline.training.job import WorkerJob
from pipeline.training.mapped_rows import check_room, map_rows
from pipeline.training.worker_callbacks import (
    Attempt,
    HeartbeatCallback,
    RayReportCallback,
    last_step,
    note_step,
    report_to_ray,
)
from pipeline.training.worker_checkpoints import WorkerCheckpoints
from strategies.builder import HFRLTrainerBuilder
from strategies.config.trackers import without_trackers
from strategies.dataset_rows import ID_COLUMNS, ROW_ID, have_pictures
from strategies.methods.registry import get_strategy
from strategies.mixins import NonFiniteLossError
from strategies.models.loading import load_model
from strategies.models.processor import find_processor
from strategies.models.saving import save_final
from strategies.models.sharding import zero3_init_context
from strategies.models.tokenizer import shared_tokenizer
from strategies.vision.modules import freeze_tower

__all__ = ["prepare_process", "run_worker", "train_job"]

LOADER_PROCESSES = 2
"""Default for rows with pictures."""


def run_worker(job: WorkerJob) -> dict[str, Any]:
    """Train one rank of a run; return the last step and best metric (rank 0's are the run's).

    The trainer writes to a folder of the worker's node; checkpoints reach the run's storage through `RayReportCallback`, the
    model at the end through `_save_model`.
    """
    beat()
    prepare_process(job.import_path, job.debug)
    job.models.bring(beat)

    def load_base(cfg: RunConfig, tokenizer: Any) -> Any:
        with zero3_init_context(cfg, job.sharding):
            return load_model(cfg, tokenizer)

    # Passes on a request to stop that came while the trainer was built.
    result = train_job(job, load_base, attach)
    if "best_metric" in result:
        # Not earlier: a rank that hangs in the upload would count as finished.
        beat(over=True)
    return result


def prepare_process(import_path: str, debug: bool) -> None:
    """Set up this process for training.

    Args:
        import_path: the driver's current directory, from which it could import: Ray has changed this process's.
        debug: don't silence the libraries.
    """
    if not debug:
        _silence()
    sys.path.append(import_path)


def train_job(
    job: WorkerJob,
    load_base: Callable[[RunConfig, Any], Any],
    announce: Callable[[Any], None],
    deliver: Callable[[StepReport], None] = report_to_ray,
    checkpoints: WorkerCheckpoints | None = None,
) -> dict[str, Any]:
    """Train one rank of a run; return the last step and best metric, why the run was refused, or that it was stopped.

    Args:
        job: the rank's arguments.
        load_base: returns the model of a config, given it and the tokenizer; called in the order of a run's random numbers.
        announce: called with the trainer before it trains.
        deliver: as in `RayReportCallback`.
        checkpoints: stores those of the rank, for a caller that outlives the training.
    """
    scratch, reached = _scratch_folder(job)
    checkpoints = checkpoints or WorkerCheckpoints(job.location())
    beat()
    trainer, processing = _build(job, scratch, checkpoints, load_base)
    announce(trainer)
    beat()
    try:
        _train(trainer, job, scratch, reached, checkpoints, deliver)
    except NonFiniteLossError as error:  # raised on all ranks; a restart would fail again
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # reports the last records
        remove_scratch(job.scratch)
        return {"step": trainer.state.global_step, "refused": str(error)}
    if trainer.stopped:
        remove_scratch(job.scratch)
        return {"step": trainer.state.global_step, "stopped": True}
    _save_model(trainer, processing, scratch, job)
    if job.cfg.hub_model_id is not None:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    remove_scratch(job.scratch)
    return {"step": trainer.state.global_step, "best_metric": trainer.state.best_metric, "ended_early": trainer.ended_early}


def _train(
    trainer: Any,
    job: WorkerJob,
    scratch: Path,
    reached: int | None,
    checkpoints: WorkerCheckpoints,
    deliver: Callable[[StepReport], None],
) -> None:
    """Train, resuming from the newest intact checkpoint if there is one.

    Raises:
        ValueError: when all are damaged, or the newest intact one is another run's.
    """
    filesystem, run = job.location()
    names = _checkpoints(filesystem, run)
    notes, setup = list(trainer.notes), _setup(trainer)

    def add_report(checkpoint: str | None) -> None:
        attempt, callbacks = Attempt(reached, checkpoint, notes, setup), trainer.callback_handler.callbacks
        # Right after the heartbeat: a report may block for minutes. Before all others: a plugin's callback that fails costs no
        # checkpoint, and transformers' `PrinterCallback` takes `total_flos` out of the logs.
        index = next(index for index, callback in enumerate(callbacks) if isinstance(callback, HeartbeatCallback))
        callbacks.insert(index + 1, RayReportCallback(checkpoints, scratch, job.run, trainer.ledger, attempt, deliver))

    for name in names:
        checkpoint = ray.train.Checkpoint(f"{run}/{name}", filesystem)
        with checkpoint.as_directory() as folder:
            # Collective, with the same answer on all ranks, so all continue with the same checkpoint.
            if (damage := trainer.verify_checkpoint(Path(folder))) is not None:
                notes.append(f"{name} is not used: {damage}")
                continue
            add_report(name)
            # Inside the context, at whose end Ray deletes a downloaded folder.
            trainer.train(resume_from_checkpoint=folder)
            return
    if names:
        # A plain ValueError ends the run (`find_user_error`); a restart would read the same checkpoints.
        raise ValueError("\n".join(["no checkpoint of the run is sound; start again in another output_dir", *notes]))
    add_report(None)
    trainer.train()


def _checkpoints(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Return complete checkpoints, newest first, the same on every rank; delete incomplete ones of dead workers."""
    names = None
    # Rank 0 decides for all: listings at different moments may differ, and ranks must not resume from different steps.
    if ray.train.get_context().get_world_rank() == 0:
        with_retries(partial(clean, filesystem, run), "removing half stored checkpoints")
        names = with_retries(partial(complete, filesystem, run), "looking for checkpoints")
    return broadcast_from_rank_zero(names)


def _build(
    job: WorkerJob, scratch: Path, checkpoints: WorkerCheckpoints, load_base: Callable[[RunConfig, Any], Any]
) -> tuple[Any, Any]:
    """Return the trainer, and what is saved beside its model: the processor where it takes pictures, or the tokenizer."""
    cfg = without_trackers(job.cfg).model_copy(update={"output_dir": str(scratch)})  # the driver reports
    set_seed(cfg.seed)  # a new adapter gets the same weights on every rank
    # On a host, of all trials: loading takes longer than all else that a trial needs to begin, and others would wait.
    tokenizer = shared_tokenizer(cfg)
    beat()
    model = load_base(cfg, tokenizer)
    beat()
    processor = find_processor(cfg, tokenizer)
    with_pictures = bool(job.prepared.manifest.get("pictures"))
    if with_pictures and cfg.dataloader_num_workers is None:
        cfg = cfg.model_copy(update={"dataloader_num_workers": loader_processes()})
    # Without a processor the builder freezes the tower, as rows of text alone want it.
    builder = HFRLTrainerBuilder(cfg, model, _with_day(tokenizer, job.prepared), processor if with_pictures else None)
    builder.extra_arguments = job.sharding
    columns = [*ID_COLUMNS[get_strategy(cfg.rl).batch_kind], ROW_ID, *([IMAGES] if with_pictures else [])]
    cache = NodeCache.of(cfg.ray)
    check_room(cache, job.prepared, job.scores, columns)
    builder.train_dataset = map_rows(cache, job.prepared, job.scores, TRAIN, columns)
    if job.selection is not None:
        # By indices, so that the rows themselves are not copied. The evaluation's rows all stay.
        kept, new = job.selection.indices(), job.selection.fingerprint
        builder.train_dataset = builder.train_dataset.select(kept, keep_in_memory=True, new_fingerprint=new)
    if job.prepared.eval_rows:
        builder.eval_dataset = map_rows(cache, job.prepared, job.scores, EVAL, columns)
    if not have_pictures(builder.train_dataset):
        # Only evaluation rows may have any: nothing would train the tower, and DDP would wait for its gradients.
        freeze_tower(model)
    builder.world_size = cfg.num_workers  # an elastic run keeps the global batch of `max` workers
    builder.callbacks += [HeartbeatCallback()]
    beat()
    builder.identity["prepared data"] = job.prepared.fingerprint
    builder.checkpoint_storage = checkpoints
    trainer = builder.build(job.total_steps)
    _sync_watched(trainer, job, scratch)
    # accelerate may take it as 1 (no GPU, and `use_cpu` not set): each rank would train alone, without an error.
    assert trainer.args.world_size == ray.train.get_context().get_world_size()
    return trainer, processor if processor is not None else tokenizer


def loader_processes() -> int:
    """Return the number of processes that make pixels beside a training worker: 2, or 1 where it has one CPU."""
    # Beside the step, not in it: even one process hides its work wherever the step waits, for a GPU or for other workers.
    return min(LOADER_PROCESSES, max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))


def _with_day(tokenizer: Any, prepared: Prepared) -> Any:
    """Fix the date in the chat template to that of the prepared rows, where the trainer renders prompts itself."""
    day, template = prepared.manifest["inputs"].get("template_date"), tokenizer.chat_template
    if day is None or prepared.manifest["kind"] != "prompt" or not prints_date(template):
        return tokenizer
    result, has_names = copy.deepcopy(tokenizer), isinstance(template, dict)
    named = {name: dated(text, date.fromisoformat(day)) for name, text in (template if has_names else {"": template}).items()}
    result.chat_template = named if has_names else named[""]
    return result


def _setup(trainer: Any) -> dict[str, Any]:
    """Return device, dtypes and packing of a worker, for the run's page."""
    args = trainer.args
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "weights": str(trainer.model.dtype).removeprefix("torch."),
        "products": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "packed": getattr(trainer, "packed", False),
    }


def _sync_watched(trainer: Any, job: WorkerJob, scratch: Path) -> None:
    """Upload watched folders if the run's folder is a URI; added last, after the callbacks that write them."""
    names = watched_folders(job.cfg)
    if names and is_uri(job.cfg.output_dir):
        trainer.add_callback(SyncFoldersCallback(scratch, names, *job.location()))


def _scratch_folder(job: WorkerJob) -> tuple[Path, int | None]:
    """Open the run's scratch folder, shared by the node's ranks; return it with the step that former workers had reached.

    Watched folders in it are links into the run's folder where that is a local path; to a URI, `SyncFoldersCallback` copies
    them.
    """
    scratch = scratch_of(job.scratch)
    reached = None
    if ray.train.get_context().get_local_rank() == 0:
        # Before `open_scratch`, which deletes the note.
        reached = last_step(scratch, job.run)
        if job.former_scratch is not None:
            reached = last_step(scratch_of(job.former_scratch), job.run) if reached is None else reached
            remove_scratch(job.former_scratch)
        open_scratch(job.scratch)
        note_step(scratch, job.run, reached)  # for the next workers, if these take no step
        link_watched(job.cfg, scratch)
    # The other ranks of the node use the folder that their first one has just replaced.
    barrier()
    return scratch, reached


def _save_model(trainer: Any, processing: Any, scratch: Path, job: WorkerJob) -> None:
    """Save the model in the scratch folder, then put it into the run's folder."""
    local = save_final(trainer, processing, scratch / "model")
    if trainer.is_world_process_zero():
        put_model(local, *job.location())
    trainer.accelerator.wait_for_everyone()


def _silence() -> None:
    """Silence libraries, whose warnings are about choices that are made here, not by the user."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
