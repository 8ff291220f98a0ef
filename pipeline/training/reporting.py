"""From the trainer's events to Ray Train.

`ray.train.report` is a barrier of all workers and is handed on once per poll of Ray's controller. So records are
collected and reported together: at each checkpoint, at each evaluation, at the end, and at a logging step when the
last report is `REPORT_INTERVAL_S` old. Rank 0's clock decides for all ranks. A report also waits for the checkpoints before
it to be stored; so that training doesn't, records are kept meanwhile.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointUploadMode
from ray.train.collective import broadcast_from_rank_zero
from transformers import TrainerCallback

from pipeline.patience import patiently
from pipeline.training.checkpoints import free_name, recorded, stage, step_of, store
from pipeline.training.pulse import beat

__all__ = ["Pulse", "RayReport", "last_step"]

REPORT_INTERVAL_S = 2.0
PROGRESS = "last-step"


class RayReport(TrainerCallback):
    """Reports records and checkpoints of a trainer to Ray Train; every rank needs one.

    Args:
        scratch: the run's folder on this node, where the last step is written down for whoever comes after.
        run: which run it is: a folder of the same name may have been another's.
        reached: the step that the workers before these had reached, where it is known.

    Attributes:
        resumed_step: step of the checkpoint that this worker starts from, None for a fresh start; the first report
            says it, so that records after it, which are about to be repeated, can be dropped, and brings those up to it.
        notes: what a person should know of the trainer; the first report brings them.
        setup: what the worker computes with; the first report brings it.
        ledger: the trainer's; each rank's report brings what is new in it.
    """

    def __init__(self, scratch: Path, run: str, reached: int | None) -> None:
        self._progress = scratch / PROGRESS
        self._run = run
        self._reached = reached
        self.resumed_step: int | None = None
        self.notes: list[str] = []
        self.setup: dict[str, Any] = {}
        self.ledger: Any = None
        self._records: list[dict[str, Any]] = []
        self._adopted: tuple[ray.train.Checkpoint, str] | None = None
        self._latest: dict[str, float] = {}
        self._last_report = float("-inf")
        self._stored = threading.Event()
        self._stored.set()

    def resume(self, checkpoint: ray.train.Checkpoint, name: str) -> None:
        """Say with the first report that the run goes on from this checkpoint.

        One that is complete, but whose report was lost with the worker that made it, is reported again, so that Ray knows it.
        """
        storage = ray.train.get_context().get_storage()
        self.resumed_step = step_of(name)
        known = None
        if ray.train.get_context().get_world_rank() == 0:
            find = partial(recorded, storage.storage_filesystem, storage.experiment_fs_path)
            known = name in patiently(find, "looking for checkpoints", beat)
        if not broadcast_from_rank_zero(known):
            self._adopted = (checkpoint, name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start with the history that a checkpoint brings: records may have been lost with the driver that had them."""
        self._records = [_numbers(entry) for entry in state.log_history] if self.resumed_step else []
        for record in self._records:
            self._latest.update({key: value for key, value in record.items() if key != "step"})
        if self._adopted is not None:
            checkpoint, name = self._adopted
            self._report(state, checkpoint, name, {"checkpoint_upload_mode": CheckpointUploadMode.NO_UPLOAD})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the step down."""
        if args.local_process_index == 0:
            self._progress.write_text(f"{self._run} {state.global_step}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Collect a record."""
        numbers = _numbers(logs)
        self._records.append({"step": state.global_step, **numbers, "time": time.time()})
        self._latest.update(numbers)
        evaluated = any(name.startswith("eval_") for name in logs)
        if self._is_due(evaluated, args):
            self._report(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Hand this rank's part of the checkpoint that the trainer has just written to Ray, which stores it meanwhile.

        One at a time: storage that is slower than training would fill this node's disk.
        """
        self.wait_until_stored()
        context = ray.train.get_context()
        storage = context.get_storage()
        name = None
        if context.get_world_rank() == 0:
            find = partial(free_name, storage.storage_filesystem, storage.experiment_fs_path, state.global_step)
            name = patiently(find, "looking for checkpoints", beat)
        name = broadcast_from_rank_zero(name)
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        rank = context.get_world_rank()
        staged = stage(written, rank, Path(args.output_dir) / f"storing-{rank}" / name)
        self._stored.clear()
        self._report(
            state,
            ray.train.Checkpoint.from_directory(str(staged)),
            name,
            {"checkpoint_upload_mode": CheckpointUploadMode.ASYNC, "checkpoint_upload_fn": self._store},
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report what is left."""
        self.wait_until_stored()
        self._report(state)

    def wait_until_stored(self) -> None:
        """Return when this rank's parts of all checkpoints are in storage, or couldn't be stored."""
        while not self._stored.wait(timeout=5):
            beat()

    def _store(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Runs in a thread beside the training; Ray removes the staged files afterwards."""
        storage = ray.train.get_context().get_storage()
        target = f"{storage.experiment_fs_path}/{name}"
        try:
            store(Path(checkpoint.path), storage.storage_filesystem, target)
        finally:
            self._stored.set()
        return ray.train.Checkpoint(target, storage.storage_filesystem)

    def _is_due(self, evaluated: bool, args: Any) -> bool:
        import torch
        import torch.distributed as dist

        due = evaluated or time.monotonic() - self._last_report > REPORT_INTERVAL_S or args.process_index != 0
        due = due and self._stored.is_set()
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor([due], dtype=torch.uint8, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            due = bool(flag.item())
        return due

    def _report(
        self, state: Any, checkpoint: Any = None, name: str | None = None, storing: dict[str, Any] | None = None
    ) -> None:
        metrics = {"step": state.global_step, "epoch": float(state.epoch or 0), **self._latest, "records": self._records}
        metrics["ledger"] = self.ledger.take()
        if self._last_report == float("-inf"):
            metrics["resumed"] = self.resumed_step or 0
            metrics["repeated"] = None if self._reached is None else max(self._reached - (self.resumed_step or 0), 0)
            metrics["notes"] = self.notes
            metrics["skipped"] = list(self.ledger.skipped)
            metrics["setup"] = self.setup
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name, **(storing or {}))
        self._records = []
        self._last_report = time.monotonic()


class Pulse(TrainerCallback):
    """A sign of life at everything that a trainer tells of."""

    def _beat(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        beat(state.global_step)

    on_train_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end = _beat
    on_prediction_step = on_evaluate = on_log = on_save = on_train_end = _beat


def _numbers(logs: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a log; `step` stays a whole one."""
    numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
    return {**numbers, "step": int(logs["step"])} if "step" in logs else numbers


def last_step(scratch: Path, run: str) -> int | None:
    """The step that workers of this run which shared this folder had reached."""
    try:
        whose, step = (scratch / PROGRESS).read_text().split()
    except (FileNotFoundError, ValueError):  # the second for one that a kill left empty
        return None
    return int(step) if whose == run else None
