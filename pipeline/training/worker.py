"""What one training worker does: load, build, train, save. Runs inside Ray Train."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["WorkerJob", "scratch_of", "train_worker"]


@dataclass(frozen=True)
class WorkerJob:
    """What every worker is given."""

    cfg: Any
    """The validated config, its paths made absolute."""
    prepared: Any
    """`pipeline.data.Prepared`: where the rows are."""
    total_steps: int
    run: str
    """`RunFolder.run_id`: which run it is."""
    import_path: str
    """The driver's current directory, where the recipe's reward functions may lie."""
    queue: Any
    """The driver's queue of events, where a worker says that it has started."""
    sharding: dict[str, Any]
    """`cluster.sharding.sharding_arguments` of the config."""
    scores: Any = None
    """`pipeline.reference.Scores` of these rows, where the reference is cached."""
    debug: bool = False


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train `config["job"]`; returns the last step and metrics (rank 0's are the run's).

    The trainer writes to a folder of the worker's node; checkpoints reach the run's storage through Ray, the model at
    the end through `_save_model`.
    """
    from pipeline.session import use_own_threads
    from pipeline.training.pulse import beat
    from pipeline.training.reporting import RayReport
    from strategies.mixins import NonFiniteLossError

    job: WorkerJob = config["job"]
    use_own_threads()
    _announce(job.queue)
    if not job.debug:
        _silence()
    scratch, reached = _scratch_folder(job)
    report = RayReport(scratch, job.run, reached)
    beat()
    trainer, tokenizer = _build(job, scratch, report)
    beat()
    try:
        _train(trainer, report, scratch)
    except NonFiniteLossError as error:  # all ranks agree on it, and a restart would come to it again
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # reports what led there
        shutil.rmtree(scratch, ignore_errors=True)
        return {"step": trainer.state.global_step, "refused": str(error)}
    if trainer.stopped:
        shutil.rmtree(scratch, ignore_errors=True)
        return {"step": trainer.state.global_step, "stopped": True}
    _save_model(trainer, tokenizer, scratch)
    if job.cfg.hub_model_id is not None:
        trainer.push_to_hub()
    trainer.accelerator.wait_for_everyone()
    shutil.rmtree(scratch, ignore_errors=True)
    beat(over=True)
    return {"step": trainer.state.global_step, "best_metric": trainer.state.best_metric}


def _announce(queue: Any) -> None:
    """Tell the driver that this worker has started, where, and how it is asked."""
    import os
    import socket

    import ray
    import ray.train

    context = ray.get_runtime_context()
    where = {"actor": context.current_actor, "node": socket.gethostname(), "pid": os.getpid()}
    where["group"] = ray.util.get_current_placement_group()
    queue.put({"event": "worker", "rank": ray.train.get_context().get_world_rank(), **where})


def _train(trainer: Any, report: Any, scratch: Path) -> None:
    """Train, from the newest sound checkpoint on if there are any.

    Raises:
        ValueError: when all are damaged, or the newest sound one is another run's.
    """
    import ray.train

    storage = ray.train.get_context().get_storage()
    names = _checkpoints(storage)
    for name in names:
        checkpoint = ray.train.Checkpoint(f"{storage.experiment_fs_path}/{name}", storage.storage_filesystem)
        with checkpoint.as_directory() as folder:
            if (damage := trainer.find_damage(Path(folder))) is not None:
                report.notes.append(f"{name} is not used: {damage}")
                continue
            report.resume(checkpoint, name)
            trainer.train(resume_from_checkpoint=folder)
            return
    if names:
        raise ValueError("\n".join(["no checkpoint of the run is sound; start again in another output_dir", *report.notes]))
    trainer.train()


def _checkpoints(storage: Any) -> list[str]:
    """Complete checkpoints, newest first, the same on every rank; what a dead worker left half stored is removed."""
    import ray.train
    from ray.train.collective import broadcast_from_rank_zero

    from pipeline.patience import patiently
    from pipeline.training.checkpoints import clean, complete

    names = None
    if ray.train.get_context().get_world_rank() == 0:
        where = (storage.storage_filesystem, storage.experiment_fs_path)
        patiently(partial(clean, *where), "removing half stored checkpoints")
        names = patiently(partial(complete, *where), "looking for checkpoints")
    return broadcast_from_rank_zero(names)


def _build(job: WorkerJob, scratch: Path, report: Any) -> tuple[Any, Any]:
    import ray.train
    from datasets import Dataset
    from transformers import set_seed

    from pipeline.training.pulse import attach, beat
    from pipeline.training.reporting import Pulse
    from strategies.builder import HFRLTrainerBuilder
    from strategies.models import load_model
    from strategies.registry import get_strategy
    from strategies.rows import ID_COLUMNS, ROW_ID
    from strategies.sharding import divided_loading
    from strategies.tokenizer import load_tokenizer
    from strategies.trackers import without_trackers

    sys.path.append(job.import_path)
    cfg = without_trackers(job.cfg).model_copy(update={"output_dir": str(scratch)})  # the driver reports
    set_seed(cfg.seed)  # a new adapter gets the same weights on every rank
    tokenizer = load_tokenizer(cfg)
    beat()
    with divided_loading(cfg, job.sharding):
        model = load_model(cfg, tokenizer)
    beat()
    builder = HFRLTrainerBuilder(cfg, model, tokenizer)
    builder.extra_arguments = job.sharding
    columns = [*ID_COLUMNS[get_strategy(cfg.rl).batch_kind], ROW_ID]
    builder.train_dataset = Dataset(_rows(job, "train", columns))
    if job.prepared.eval_rows:
        builder.eval_dataset = Dataset(_rows(job, "eval", columns))
    builder.world_size = cfg.num_workers  # an elastic run keeps the global batch of the most
    builder.callbacks += [Pulse(), report]
    beat()
    trainer = builder.build(job.total_steps)
    _mirror(trainer, job.cfg, scratch)
    trainer.identity["prepared data"] = job.prepared.fingerprint
    trainer.fetch_checkpoint = partial(_fetch_checkpoint, report)
    report.notes, report.ledger = list(trainer.notes), trainer.ledger
    attach(trainer)
    assert trainer.args.world_size == ray.train.get_context().get_world_size()
    return trainer, tokenizer


def _mirror(trainer: Any, cfg: Any, scratch: Path) -> None:
    """Copy what a person watches to a run's folder that is a URI; after all other callbacks, which write it."""
    import ray.train

    from pipeline.storage import is_uri
    from pipeline.training.artifacts import Mirror, watched_folders

    names = watched_folders(cfg)
    if names and is_uri(cfg.output_dir):
        storage = ray.train.get_context().get_storage()
        trainer.add_callback(Mirror(scratch, names, storage.storage_filesystem, storage.experiment_fs_path))


def _rows(job: WorkerJob, split: str, columns: list[str]) -> Any:
    """The prepared rows as one table, the reference's log-probabilities beside them where they are cached."""
    rows = job.prepared.read(split, columns)
    if job.scores is not None:
        scores = job.scores.read(split)
        for name in scores.column_names:
            rows = rows.append_column(name, scores[name])
    return rows


def _scratch_folder(job: WorkerJob) -> tuple[Path, int | None]:
    """A folder of this node for the run, shared by its ranks and empty; and the step that workers before these had reached.

    What a person wants to see while the run goes on is a link into the run's own folder where that is a path; to a URI,
    `Mirror` copies it.
    """
    import ray.train
    from ray.train.collective import barrier

    from pipeline.training.artifacts import link_watched
    from pipeline.training.reporting import last_step

    scratch = scratch_of(job.cfg.output_dir)
    reached = None
    if ray.train.get_context().get_local_rank() == 0:
        reached = last_step(scratch, job.run)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        link_watched(job.cfg, scratch)
    barrier()
    return scratch, reached


def scratch_of(output_dir: str) -> Path:
    """The folder on each node that a run's workers write to.

    The same path after a restart, also of Ray: the trainer's state names its best checkpoint by it.
    """
    return Path(tempfile.gettempdir()) / f"prefray-{hashlib.sha256(output_dir.encode()).hexdigest()[:12]}"


def _fetch_checkpoint(report: Any, folder: Path) -> None:
    """Bring what this node lacks of a checkpoint: the parts of other nodes' ranks, or all of it after a restart."""
    import ray.train
    from ray.train.collective import barrier

    from pipeline.training.checkpoints import fetch, step_of
    from strategies.checkpoints.manifest import is_complete

    report.wait_until_stored()
    barrier()
    context = ray.train.get_context()
    if context.get_local_rank() == 0 and not is_complete(folder):
        storage = context.get_storage()
        fetch(storage.storage_filesystem, storage.experiment_fs_path, step_of(folder.name), folder)
    barrier()


def _save_model(trainer: Any, tokenizer: Any, scratch: Path) -> None:
    """Save the model, then put it into the run's folder."""
    import ray.train

    from pipeline.training.artifacts import put_model
    from strategies.saving import save_final

    local = save_final(trainer, tokenizer, scratch / "model")
    if trainer.is_world_process_zero():
        storage = ray.train.get_context().get_storage()
        put_model(local, storage.storage_filesystem, storage.experiment_fs_path)
    trainer.accelerator.wait_for_everyone()


def _silence() -> None:
    """Keep to the log's point: libraries warn about choices that are made here, not by the user."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
