"""From the trainer's events to Ray Train, and from Ray Train to the driver.

`ray.train.report` is a barrier of all workers and is handed on once per poll of Ray's controller. So records are
collected and reported together: at each checkpoint, at each evaluation, at the end, and at a logging step when the
last report is `REPORT_INTERVAL_S` old. Rank 0's clock decides for all ranks.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray.exceptions
import ray.train
from ray.train import UserCallback
from transformers import TrainerCallback

from pipeline.training.folder import CHECKPOINT
from pipeline.training.ledger import merge
from pipeline.training.pulse import beat

__all__ = ["Pulse", "RayReport", "Relay"]

REPORT_INTERVAL_S = 2.0


class RayReport(TrainerCallback):
    """Reports records and checkpoints of a trainer to Ray Train; every rank needs one.

    Args:
        resumed_step: step of the checkpoint that this worker starts from, None for a fresh start; the first report
            says it, so that records after it, which are about to be repeated, can be dropped, and brings those up to it.

    Attributes:
        notes: what a person should know of the trainer; the first report brings them.
        ledger: the trainer's; each rank's report brings what is new in it.
    """

    def __init__(self, resumed_step: int | None) -> None:
        self.notes: list[str] = []
        self.ledger: Any = None
        self._resumed_step = resumed_step
        self._records: list[dict[str, Any]] = []
        self._latest: dict[str, float] = {}
        self._last_report = float("-inf")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start with the history that a checkpoint brings: records may have been lost with the driver that had them."""
        self._records = [_numbers(entry) for entry in state.log_history] if self._resumed_step else []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Collect a record."""
        numbers = _numbers(logs)
        self._records.append({"step": state.global_step, **numbers, "time": time.time()})
        self._latest.update(numbers)
        evaluated = any(name.startswith("eval_") for name in logs)
        if self._is_due(evaluated, args):
            self._report(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the checkpoint that the trainer has just written."""
        from ray.train.collective import barrier

        barrier()  # until every rank's part of the checkpoint is on disk
        context = ray.train.get_context()
        name = f"{CHECKPOINT}{state.global_step:06d}"
        if context.get_world_rank() == 0:
            _remove_orphan(name)
        barrier()
        checkpoint = None
        if context.get_local_rank() == 0:  # one upload per node: its ranks share the folder
            checkpoint = ray.train.Checkpoint.from_directory(str(Path(args.output_dir) / f"checkpoint-{state.global_step}"))
        self._report(state, checkpoint, name)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report what is left."""
        self._report(state)

    def _is_due(self, evaluated: bool, args: Any) -> bool:
        import torch
        import torch.distributed as dist

        due = evaluated or time.monotonic() - self._last_report > REPORT_INTERVAL_S
        if dist.is_initialized() and dist.get_world_size() > 1:
            flag = torch.tensor([due], dtype=torch.uint8, device=args.device)
            dist.broadcast(flag, src=0)
            due = bool(flag.item())
        return due

    def _report(self, state: Any, checkpoint: Any = None, name: str | None = None) -> None:
        metrics = {"step": state.global_step, "epoch": float(state.epoch or 0), **self._latest, "records": self._records}
        metrics["ledger"] = self.ledger.take()
        if self._last_report == float("-inf"):
            metrics["resumed"] = self._resumed_step or 0
            metrics["notes"] = self.notes
            metrics["skipped"] = list(self.ledger.skipped)
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
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


def _remove_orphan(name: str) -> None:
    """Remove a half-written checkpoint of this name: one that was recorded would not be written again."""
    storage = ray.train.get_context().get_storage()
    path = f"{storage.experiment_fs_path}/{name}"
    from pyarrow import fs

    if storage.storage_filesystem.get_file_info(path).type != fs.FileType.NotFound:
        storage.storage_filesystem.delete_dir(path)


class Relay(UserCallback):
    """Runs in Ray's controller: passes records and failures on to the driver's queue."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Pass on rank 0's records, and what all ranks have trained on."""
        event = {"event": "report", "step": metrics[0]["step"], "records": metrics[0]["records"]}
        event["ledger"] = merge(rank["ledger"] for rank in metrics)
        if checkpoint is not None:
            event["checkpoint"] = Path(checkpoint.path).name
        if "resumed" in metrics[0]:
            event["resumed"] = metrics[0]["resumed"]
            event["notes"] = metrics[0]["notes"]
            event["skipped"] = metrics[0]["skipped"]
        self._queue.put(event)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Pass on which workers failed and why."""
        failures = {rank: _reason(error) for rank, error in worker_exceptions.items()}
        died = [rank for rank, error in worker_exceptions.items() if _is_death(error)]
        self._queue.put({"event": "failure", "failures": failures, "died": died, "time": time.time()})


def _is_death(error: Exception) -> bool:
    """Whether a worker's process is gone, as against an error that it raised."""
    return isinstance(getattr(error, "health_check_failure", None), ray.exceptions.RayActorError)


def _reason(error: Exception) -> str:
    """The last line of a worker's error: what was raised, without the way there."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]
