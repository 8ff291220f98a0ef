"""The trainer's callbacks in a worker: heartbeats, and reports to Ray Train.

`ray.train.report` is a barrier of all workers, and its reports are forwarded once per poll of Ray's controller. So records are
collected and reported together: before a checkpoint is stored and once it is, at each evaluation, at the end, and at a logging
step when the last report is `REPORT_INTERVAL_S` old. Rank 0's clock decides for all ranks.

Each rank stores its part of a checkpoint beside the training; when all have, a report names the checkpoint, and rank 0 deletes
old ones. Meanwhile records are only collected.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
from transformers import TrainerCallback

from pipeline.runs.checkpoints import step_of
from pipeline.training.controller_callback import REPORT
from pipeline.training.events import AttemptStarted, StepReport
from pipeline.training.heartbeat import beat
from pipeline.training.worker_checkpoints import WorkerCheckpoints
from strategies.batch.row_ledger import Ledger

__all__ = ["Attempt", "HeartbeatCallback", "RayReportCallback", "last_step", "note_step", "report_to_ray"]

REPORT_INTERVAL_S = 2.0
PROGRESS = "last-step"


@dataclass(frozen=True)
class Attempt:
    """How workers start: part of their first report."""

    reached: int | None
    """The step that former workers had reached, if known."""
    checkpoint: str | None
    """Name of the checkpoint that they start from; None for a fresh start. Its records may have been lost with a driver that
    hadn't written them, so the first report has them; those of later steps, which will be repeated, are dropped."""
    notes: list[str]
    """Notes for the user."""
    setup: dict[str, Any]
    """Device and dtypes of the worker."""


def report_to_ray(report: StepReport) -> None:
    """Send a report to the driver of the workers."""
    ray.train.report({REPORT: report})


class RayReportCallback(TrainerCallback):
    """Reports a trainer's records to Ray Train, and stores its checkpoints; every rank needs one.

    Args:
        checkpoints: stores them.
        scratch: the run's scratch folder on this node, in which the last step is noted for the workers after these.
        run: id of the run: a folder of the same name may have been another's.
        ledger: rows of the trainer's steps; each report has the new entries of its rank.
        attempt: how the worker starts.
        deliver: sends a report to the run's driver; a barrier of all ranks, as Ray Train's is.
    """

    def __init__(
        self,
        checkpoints: WorkerCheckpoints,
        scratch: Path,
        run: str,
        ledger: Ledger,
        attempt: Attempt,
        deliver: Callable[[StepReport], None] = report_to_ray,
    ) -> None:
        self._deliver = deliver
        self._checkpoints = checkpoints
        self._scratch = scratch
        self._run = run
        self._ledger = ledger
        self._attempt = attempt
        self._records: list[dict[str, Any]] = []
        self._last_report = float("-inf")
        self._reported_step = -1
        self._checkpoint = attempt.checkpoint
        """Name of the last checkpoint, until it is reported as complete; first of that which the worker starts from, whose own
        report may have been lost."""
        self._best: int | None = None
        """Step of the best checkpoint when that one was written."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin with the checkpoint's log history: its records may have been lost with a driver that hadn't written them."""
        self._records = [_numbers(entry) for entry in state.log_history] if self._attempt.checkpoint is not None else []
        self._best = _best_step(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the step in the scratch folder, and report a checkpoint that is complete."""
        if args.local_process_index == 0:
            note_step(self._scratch, self._run, state.global_step)
        if self._checkpoint is not None and self._reported_step >= 0 and self._is_due(True, args):
            self._report(args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """Collect a record."""
        numbers = _numbers(logs)
        self._records.append({"step": state.global_step, **numbers, "time": time.time()})
        # At once: a sweep's scheduler waits for evaluations, to stop trials.
        evaluated = any(name.startswith("eval_") for name in logs)
        if self._is_due(evaluated, args):
            self._report(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Store this rank's part of the checkpoint that the trainer has just written, beside the training."""
        if self._reported_step != state.global_step:  # records before the checkpoint: a resumed run doesn't repeat their steps
            self._report(args, state)
        # Not the best one at the time of the report: a later one may be best by then, and not be stored yet.
        self._best = _best_step(state)
        self._checkpoint = self._checkpoints.put(Path(args.output_dir) / f"checkpoint-{state.global_step}", state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the remaining records."""
        self._checkpoints.wait()
        self._report(args, state)
        self._checkpoints.wait()

    def _is_due(self, at_once: bool, args: Any) -> bool:
        import torch
        import torch.distributed as dist

        due = at_once or time.monotonic() - self._last_report > REPORT_INTERVAL_S or args.process_index != 0
        # Called on every rank, whatever `due` is: it raises errors of the upload.
        due = self._checkpoints.is_idle() and due
        # Reports are barriers, so all ranks must decide alike: rank 0 by its clock, and every rank by its pending upload.
        if dist.is_initialized() and dist.get_world_size() > 1:
            # On the trainer's device: NCCL reduces tensors of a GPU only.
            flag = torch.tensor([due], dtype=torch.uint8, device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            due = bool(flag.item())
        return due

    def _report(self, args: Any, state: Any) -> None:
        """Report, when all ranks have stored the last checkpoint."""
        attempt = None
        # The first report of these workers, also after a restart.
        if self._last_report == float("-inf"):
            begun = self._attempt
            resumed = 0 if begun.checkpoint is None else step_of(begun.checkpoint)
            repeated = None if begun.reached is None else max(begun.reached - resumed, 0)
            attempt = AttemptStarted(resumed, repeated, begun.notes, list(self._ledger.skipped), begun.setup)
        # Stored by all ranks: `_is_due` has reduced that, or each has called `wait` before this barrier.
        name, self._checkpoint = self._checkpoint, None
        report = StepReport(state.global_step, self._records, self._ledger.take(), attempt, name)
        self._deliver(report)
        self._records, self._reported_step = [], state.global_step
        self._last_report = time.monotonic()
        if name is not None and args.process_index == 0:
            self._checkpoints.rotate(name, args.save_total_limit, self._best)


def _best_step(state: Any) -> int | None:
    # transformers keeps the path in the scratch folder, where the checkpoint no longer is.
    return step_of(Path(state.best_model_checkpoint).name) if state.best_model_checkpoint else None


class HeartbeatCallback(TrainerCallback):
    """Records a heartbeat at every event of the trainer."""

    def _beat(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        beat(state.global_step)

    on_train_begin = on_step_begin = on_substep_end = on_pre_optimizer_step = on_step_end = _beat
    on_prediction_step = on_evaluate = on_log = on_save = on_train_end = _beat


def _numbers(logs: dict[str, Any]) -> dict[str, Any]:
    """Return the numeric values of a log as floats; `step` as int."""
    numbers = {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}
    return {**numbers, "step": int(logs["step"])} if "step" in logs else numbers


def note_step(scratch: Path, run: str, step: int | None) -> None:
    """Note the step that workers of a run have reached in their scratch folder, if it is known."""
    if step is not None:
        (scratch / PROGRESS).write_text(f"{run} {step}")


def last_step(scratch: Path, run: str) -> int | None:
    """Return the step that former workers of this run on this node had reached; None where it isn't known."""
    try:
        whose, step = (scratch / PROGRESS).read_text().split()
    except (FileNotFoundError, ValueError):  # ValueError: a killed worker left it empty
        return None
    return int(step) if whose == run else None
