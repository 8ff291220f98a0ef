"""A trial, as Ray Tune runs it: an actor that follows one run of `train` after the other and hands its evaluations on."""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import ray
from ray.tune import Trainable

from pipeline.config import RunConfig
from pipeline.display import SilentDisplay
from pipeline.errors import RunCancelled
from pipeline.session import set_intervals
from pipeline.storage import Location
from pipeline.tracking.run import Membership, name_of
from pipeline.training.checkpoints import step_of
from pipeline.training.driver import train
from pipeline.training.folder import RunFolder
from pipeline.training.forking import fork, origin_of
from pipeline.training.metrics import MetricsFile
from pipeline.training.stopping import RunControl
from pipeline.training.worker import scratch_of
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.searching import DRAW, EVALUATION, trial_number
from pipeline.tuning.space import trial_recipe

__all__ = ["TrialFailed", "TrialJob", "TrialRun"]

STOP_WITHIN_S = 30.0
LISTEN_EVERY_S = 1.0


class TrialFailed(RuntimeError):
    """A trial ended although it wasn't told to; says why in one line."""


@dataclass(frozen=True)
class TrialJob:
    """What every trial is given."""

    cfg: RunConfig
    """The sweep's recipe, its paths made absolute."""
    sweep: Location
    """The sweep's folder."""
    directory: str
    """The driver's current directory, to which paths of data are relative."""
    mailbox: Any
    """The driver's `Mailbox`."""
    evaluations: int
    """Of one whole run of the recipe."""
    at_checkpoints: bool
    """Hand an evaluation on when the checkpoint of its step is stored, since the scheduler may go on from it."""
    debug: bool
    environment: dict[str, str]
    """How the driver finds the store that the sweep's folder is in, and its trackers."""
    parent: str | None
    """MLflow's id of the sweep's run."""


class TrialRun(Trainable):
    """Ray Tune's view of a trial; `setup` and `reset_config` begin one, `step` returns its next evaluation."""

    def setup(self, config: dict[str, Any], job: TrialJob) -> None:
        """Begin the first trial of this actor."""
        self.job = job
        if os.path.isdir(job.directory):
            os.chdir(job.directory)
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
        self.values = config[DRAW]["values"]
        self._run: _Run | None = None
        self._pointer: dict[str, Any] | None = None

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation; after the last one, for the end of the run.

        Raises:
            TrialFailed: when the run has ended otherwise.
        """
        if self._run is None:
            self._run = _Run(self.job, self.number, self.values, self._pointer)
        return self._run.next_result()

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Where the trial's newest checkpoint is: the run's folder has the checkpoint itself."""
        return self._run.pointer() if self._run is not None else (self._pointer or {})

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Go on from a checkpoint, this trial's or another's."""
        self._leave()
        self._run, self._pointer = None, checkpoint or None

    def cleanup(self) -> None:
        """End the run, if it goes on, and free its workers."""
        self._leave()

    def _leave(self) -> None:
        if self._run is not None:
            self._run.cancel()


class _Run(SilentDisplay):
    """One run of `train` in a thread, whose display this is."""

    def __init__(self, job: TrialJob, number: int, values: Any, pointer: dict[str, Any] | None) -> None:
        self.job, self.number = job, number
        self._sweep = SweepFolder(job.sweep)
        self._results: queue.Queue[dict[str, Any]] = queue.Queue()
        self._control = RunControl(lambda group: self._tell(group=group))
        self._metrics: dict[str, float] = {}
        self._waiting: list[dict[str, Any]] = []
        self._saved = 0
        self._step = self._total = self._tokens = 0
        self._error: BaseException | None = None
        self._origin: str | None = None
        self.folder = ""
        self.name = uuid4().hex
        self._asked = time.monotonic()
        self._thread = threading.Thread(target=self._train, args=(values, pointer), name=f"trial-{number}", daemon=True)
        self._thread.start()

    # The run

    def _train(self, values: Any, pointer: dict[str, Any] | None) -> None:
        try:
            cfg = self._place(values, pointer)
            self._tell(folder=self.folder, values=values, origin=self._origin)
            member = Membership(name_of(self.job.sweep), self.folder, values or {}, self.job.parent)
            result = train(cfg, resume=True, display=self, debug=self.job.debug, control=self._control, member=member)
            for record in MetricsFile(RunFolder(self._sweep.trial(self.folder)).metrics).read():
                self._take(record)  # also of a run that had finished before
            self._step = self._total = result.steps
            self._tell_standing()
        except BaseException as error:  # noqa: BLE001 - handed to `next_result`, which raises it
            if not isinstance(error, RunCancelled):
                self._tell(error=str(error) or type(error).__name__)
            self._error = error

    def _place(self, values: Any, pointer: dict[str, Any] | None) -> RunConfig:
        """The trial's recipe, in a folder that is new, or holds a run of it to go on with, or one begun from another's."""
        own = self._sweep.runs_of(self.number)
        self.folder = own[-1] if own else f"{self.number:03d}"
        cfg = trial_recipe(self.job.cfg, values, str(self._sweep.trial(self.folder)))
        begun = own and not RunFolder(self._sweep.trial(self.folder)).changes(cfg)
        if pointer and pointer["folder"] not in own and not (begun and self._is_fork_of(pointer)):
            self.folder = f"{self.number:03d}.{len(own)}" if own else self.folder
            cfg = cfg.model_copy(update={"output_dir": str(self._sweep.trial(self.folder))})
            target = RunFolder(self._sweep.trial(self.folder))
            step = fork(RunFolder(self._sweep.trial(pointer["folder"])), pointer["step"], target, cfg)
            self._origin = f"trial {pointer['number']} at step {step}"
        elif own and not begun:
            # Of a trial that a killed driver had begun and forgot.
            self._sweep.trials.delete(self.folder)
        return cfg

    def _is_fork_of(self, pointer: dict[str, Any]) -> bool:
        """Whether the trial's last run was begun from this checkpoint already."""
        asked = {"path": str(self._sweep.trial(pointer["folder"])), "asked": pointer["step"]}
        return asked.items() <= (origin_of(RunFolder(self._sweep.trial(self.folder))) or {}).items()

    def cancel(self) -> None:
        """End it."""
        self._control.cancel()
        self._thread.join(timeout=STOP_WITHIN_S)
        shutil.rmtree(scratch_of(str(self._sweep.trial(self.folder))), ignore_errors=True)

    # Results

    def next_result(self) -> dict[str, Any]:
        """The next evaluation, or, when the run has ended, the last one again and `done`."""
        while True:
            try:
                return self._results.get(timeout=0.2)
            except queue.Empty:
                if self._thread.is_alive():
                    self._listen()
                    continue
            if not self._results.empty():
                continue
            if self._error is not None:
                if isinstance(self._error, RunCancelled):
                    return {**self._result(), "done": True}
                raise TrialFailed(str(self._error)) from self._error
            return {**self._result(), "done": True}

    def _listen(self) -> None:
        """End when the driver says so: Tune can't, as long as it waits for the next evaluation."""
        if time.monotonic() - self._asked > LISTEN_EVERY_S:
            self._asked = time.monotonic()
            if ray.get(self.job.mailbox.is_over.remote(self.name)):
                self._control.cancel()

    def pointer(self) -> dict[str, Any]:
        """What another run needs to go on from this one."""
        return {"folder": self.folder, "step": self._saved, "number": self.number}

    def _result(self) -> dict[str, Any]:
        part = self._step / self._total if self._total else 1.0
        return {**self._metrics, "step": self._step, EVALUATION: max(1, int(part * self.job.evaluations + 1e-6))}

    def _take(self, record: dict[str, Any]) -> bool:
        """Remember what a record says; whether it is an evaluation."""
        self._step = record["step"]
        self._tokens = int(record.get("num_tokens") or self._tokens)
        evaluated = {
            name: value
            for name, value in record.items()
            if name.startswith("eval_") and value is not None and not name.endswith(("runtime", "per_second", "num_tokens"))
        }
        self._metrics.update(evaluated)
        return bool(evaluated)

    def _tell(self, **what: Any) -> None:
        self.job.mailbox.put.remote({"trial": self.number, "run": self.name, **what})

    def _tell_standing(self) -> None:
        self._tell(step=self._step, total_steps=self._total, tokens=self._tokens, metrics=dict(self._metrics))

    # Display

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage; that of training says how many steps there are."""
        self._total = total or self._total

    def record(self, record: dict[str, Any]) -> None:
        """A training or evaluation record."""
        is_evaluation = self._take(record)
        self._tell_standing()
        if not is_evaluation or self._step >= self._total:
            return  # the last one comes with the end, so that no scheduler ends a run that is about to save its model
        if self.job.at_checkpoints:
            self._waiting.append(self._result())
        else:
            self._results.put(self._result())

    def saved(self, name: str) -> None:
        """A checkpoint is complete."""
        self._saved = step_of(name)
        while self._waiting and self._waiting[0]["step"] <= self._saved:
            self._results.put(self._waiting.pop(0))

    def note(self, text: str) -> None:
        """What happens while it trains; what there is to know before is the same for all trials."""
        if self._total:
            self._tell(note=text)
