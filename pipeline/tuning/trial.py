"""A trial as Ray Tune's trainable: an actor that runs `train` in a thread and returns its evaluations to Tune."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from ray.tune import Trainable

from pipeline.config import RunConfig
from pipeline.errors import RunCancelled
from pipeline.io.storage import Location
from pipeline.ray.channel import NodeChannel
from pipeline.ray.session import set_intervals
from pipeline.runs.checkpoints import step_of
from pipeline.runs.folder import RunFolder
from pipeline.runs.fork import fork_from_checkpoint, origin_of
from pipeline.runs.metrics import MetricsFile
from pipeline.tracking.tracker import TrialInfo, name_of
from pipeline.training.driver import RunHooks, train_run
from pipeline.training.sharing import why_not_shared
from pipeline.training.slot_launch import train_in_slot
from pipeline.tuning.channel import SweepChannel, TrialBegan, TrialEvent, TrialFault, TrialNote, TrialPlaced, TrialProgress
from pipeline.tuning.cost import RunCost, cost_of
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.search import EVALUATION, SAMPLE, trial_number
from pipeline.tuning.sharing import Sharing
from pipeline.tuning.space import trial_recipe
from pipeline.ui.display import SilentDisplay

__all__ = ["TrialFailed", "TrialJob", "TrialRun"]

STOP_WITHIN_S = 30.0
LOOK_EVERY_S = 0.2


class TrialFailed(RuntimeError):
    """A trial's run failed; the message is one line."""


@dataclass(frozen=True)
class TrialJob:
    """Arguments that all trials share."""

    cfg: RunConfig
    """The sweep's recipe, its paths made absolute."""
    sweep: Location
    """The sweep's folder."""
    directory: str
    """The driver's current directory, to which paths of data are relative."""
    channel: SweepChannel
    """The driver's."""
    evaluations: int
    """Evaluations of one full run of the recipe."""
    at_checkpoints: bool
    """Report an evaluation only once the checkpoint of its step is stored, since the scheduler may resume from it."""
    debug: bool
    environment: dict[str, str]
    """Environment variables of the driver that reach the sweep's storage and its trackers."""
    parents: dict[str, str]
    """Tracker -> id of the sweep's run."""
    sharing: Sharing | None = None
    """The base that trials share."""
    hosts: NodeChannel | None = None
    """Of the driver's hosts, where trials share a base."""

    def hooks(self, cfg: RunConfig, placed: Callable[[int | None, str], None]) -> RunHooks:
        """Return what trains a trial: a slot of a host, or workers of its own.

        Args:
            cfg: the trial's recipe.
            placed: called with the host's number; with None and the reason where others share a base and this one doesn't.
        """
        if self.sharing is None or self.hosts is None:
            return RunHooks()
        if problems := why_not_shared(cfg, self.sharing.recipe):
            placed(None, "; ".join(f"{key}: {why}" for key, why in problems))
            return RunHooks()
        return RunHooks(launch=partial(train_in_slot, self.hosts, placed=placed))


class TrialRun(Trainable):
    """Trainable of a trial: `setup` and `reset_config` begin one, `step` returns its next evaluation."""

    def setup(self, config: dict[str, Any], job: TrialJob) -> None:
        """Begin the first trial of this actor."""
        self.job = job
        if os.path.isdir(job.directory):
            # Paths of data are relative to it, and this process may have been started elsewhere.
            os.chdir(job.directory)
        # Here rather than in a runtime environment, which Ray writes to its logs.
        os.environ.update(job.environment)
        set_intervals(job.cfg)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial in the same actor."""
        self._leave()
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.number = trial_number(self.trial_id, config)
        self.values = config[SAMPLE]["values"]
        self._run: _Run | None = None
        # A clone may begin from another trial's checkpoint.
        self._pointer: dict[str, Any] | None = config[SAMPLE].get("start")

    def step(self) -> dict[str, Any]:
        """Return the next evaluation; after the last one, wait for the end of the run.

        Raises:
            TrialFailed: when the run has failed.
        """
        # Only now, not in `setup`: Tune may load a checkpoint in between.
        if self._run is None:
            self._run = _Run(self.job, self.number, self.values, self._pointer)
        return self._run.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return a pointer to the trial's newest checkpoint, which the run itself has stored in its folder."""
        return self._run.pointer() if self._run is not None else (self._pointer or {})

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Resume from a checkpoint of this or another trial at the next `step`."""
        self._leave()
        self._run, self._pointer = None, checkpoint or None

    def cleanup(self) -> None:
        """Cancel the run, if there is one, and free its workers."""
        self._leave()

    def _leave(self) -> None:
        if self._run is not None:
            self._run.cancel()


class _Run(SilentDisplay):
    """One run of `train` in a thread. It is the run's display, through which it receives steps, records and checkpoints."""

    def __init__(self, job: TrialJob, number: int, values: Any, pointer: dict[str, Any] | None) -> None:
        self.job, self.number = job, number
        self._sweep = SweepFolder(job.sweep)
        self._results: queue.Queue[dict[str, Any] | None] = queue.Queue()
        """Evaluations, and None when the run has ended."""
        self._cancel = threading.Event()
        self._metrics: dict[str, float] = {}
        self._waiting: list[dict[str, Any]] = []
        self._saved = 0
        self._step = self._total = self._tokens = 0
        self._cost = RunCost()
        self._error: BaseException | None = None
        self._origin: str | None = None
        self.folder = ""
        self.name = uuid4().hex
        self._thread = threading.Thread(target=self._train, args=(values, pointer), name=f"trial-{number}", daemon=True)
        self._thread.start()

    # The run

    def _train(self, values: Any, pointer: dict[str, Any] | None) -> None:
        try:
            cfg = self._prepare_folder(values, pointer)
            self._send(TrialBegan, self.folder, values, self._origin)
            trial = TrialInfo(name_of(self.job.sweep), self.folder, values or {}, self.job.parents)
            hooks = self.job.hooks(cfg, partial(self._send, TrialPlaced))
            # Whether Tune starts the trial or tries it again: in an empty folder `resume` changes nothing.
            options: dict[str, Any] = {"debug": self.job.debug, "cancel": self._cancel, "hooks": hooks}
            result = train_run(cfg, resume=True, display=self, trial=trial, **options)
            records = MetricsFile(RunFolder(self._sweep.trial(self.folder)).metrics).read()
            for record in records:
                self._take(record)  # a run that had finished before reports no records
            self._cost = cost_of(records, result.steps, None if cfg.is_elastic else cfg.num_workers)
            self._step = self._total = result.steps
            self._send_progress()
        except BaseException as error:  # noqa: BLE001 - handed to `next_result`, which raises it
            self._error = error
            if not isinstance(error, RunCancelled):
                self._send(TrialFault, str(error) or type(error).__name__)
        finally:
            self._results.put(None)

    def _prepare_folder(self, values: Any, pointer: dict[str, Any] | None) -> RunConfig:
        """Return the trial's recipe, whose folder is new, holds its run to resume, or is forked from another trial's."""
        existing = self._sweep.runs_of(self.number)
        self.folder = existing[-1] if existing else f"{self.number:03d}"
        cfg = trial_recipe(self.job.cfg, values, str(self._sweep.trial(self.folder)))
        # No difference to the saved settings: the folder's run is this trial's.
        begun = existing and not RunFolder(self._sweep.trial(self.folder)).changes(cfg)
        # A pointer to another trial: fork its checkpoint, unless an interrupted attempt already has.
        if pointer and pointer["folder"] not in existing and not (begun and self._is_fork_of(pointer)):
            # The trial's earlier run stays, with its metrics and checkpoints, which other trials may point to.
            self.folder = f"{self.number:03d}.{len(existing)}" if existing else self.folder
            cfg = cfg.model_copy(update={"output_dir": str(self._sweep.trial(self.folder))})
            target = RunFolder(self._sweep.trial(self.folder))
            step = fork_from_checkpoint(RunFolder(self._sweep.trial(pointer["folder"])), pointer["step"], target, cfg)
            self._origin = f"trial {pointer['number']} at step {step}"
        elif existing and not begun:
            # Left by another trial of this number, which a killed driver started and whose state Tune hadn't saved.
            self._sweep.trials.delete(self.folder)
        return cfg

    def _is_fork_of(self, pointer: dict[str, Any]) -> bool:
        """Return whether the trial's last run was already forked from this checkpoint."""
        expected = {"path": str(self._sweep.trial(pointer["folder"])), "asked": pointer["step"]}
        return expected.items() <= (origin_of(RunFolder(self._sweep.trial(self.folder))) or {}).items()

    def cancel(self) -> None:
        """Cancel the run and wait for its thread."""
        self._cancel.set()
        self._thread.join(timeout=STOP_WITHIN_S)

    # Results

    def next_result(self) -> dict[str, Any]:
        """Return the next evaluation, or when the run has ended the last one again with `done`."""
        while True:
            try:
                result = self._results.get(timeout=LOOK_EVERY_S)
            except queue.Empty:
                if self.job.channel.is_over(self.name):  # Tune can't cancel it, while it waits for an evaluation
                    self._cancel.set()
                continue
            if result is not None:
                return result
            self._results.put(None)  # for another call
            if self._error is None or isinstance(self._error, RunCancelled):
                return {**self._result(), "done": True}
            raise TrialFailed(str(self._error)) from self._error

    def pointer(self) -> dict[str, Any]:
        """Return what another run needs to resume from this one."""
        return {"folder": self.folder, "step": self._saved, "number": self.number}

    def _result(self) -> dict[str, Any]:
        # By the part of the run, since trials with other batch sizes have other numbers of steps.
        part = self._step / self._total if self._total else 1.0
        # A little is added: in floats, 0.29 * 100 is 28.999999999999996.
        return {**self._metrics, "step": self._step, EVALUATION: max(1, int(part * self.job.evaluations + 1e-6))}

    def _take(self, record: dict[str, Any]) -> bool:
        """Store a record's step, tokens and metrics; return whether it is an evaluation."""
        self._step = record["step"]
        self._tokens = int(record.get("num_tokens") or self._tokens)
        evaluated = {
            name: value
            for name, value in record.items()
            # Speeds and counts would differ between equal trials, and are no objectives.
            if name.startswith("eval_") and value is not None and not name.endswith(("runtime", "per_second", "num_tokens"))
        }
        self._metrics.update(evaluated)
        return bool(evaluated)

    def _send(self, kind: type[TrialEvent], *fields: Any) -> None:
        with suppress(OSError):  # the sweep has ended, or the disk is full, which a run doesn't fail for
            self.job.channel.put(kind(self.number, self.name, *fields))

    def _send_progress(self) -> None:
        self._send(TrialProgress, self._step, self._total, self._tokens, dict(self._metrics), self._cost)

    # Display

    def stage(self, name: str, total: int | None = None) -> None:
        """Store the number of steps, which the training stage passes."""
        self._total = total or self._total

    def record(self, record: dict[str, Any]) -> None:
        """Send progress; queue an evaluation, at once or until its checkpoint is stored."""
        is_evaluation = self._take(record)
        self._send_progress()
        if not is_evaluation or self._step >= self._total:
            return  # the last one is returned with `done`, so that no scheduler stops a run that is about to save its model
        if self.job.at_checkpoints:
            self._waiting.append(self._result())
        else:
            self._results.put(self._result())

    def saved(self, name: str) -> None:
        """Queue the evaluations up to a complete checkpoint."""
        self._saved = step_of(name)
        while self._waiting and self._waiting[0]["step"] <= self._saved:
            self._results.put(self._waiting.pop(0))

    def note(self, text: str) -> None:
        """Send notes of the training stage; those of earlier stages are the same for all trials."""
        if self._total:
            self._send(TrialNote, text)
