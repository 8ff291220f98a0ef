"""The driver's eye on a sweep: what Tune says of trials and what trials say themselves becomes records, lines and a table."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.util import remove_placement_group

from pipeline.display import Display
from pipeline.patience import STORAGE_ERRORS
from pipeline.training.stopping import StopSignal
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.objectives import Measure
from pipeline.tuning.records import Status, TrialRecord
from pipeline.tuning.searching import DRAW, trial_number
from pipeline.tuning.space import shown_values
from pipeline.tuning.table import live_table

__all__ = ["Relayed", "Watch"]

WRITE_EVERY_S = 2.0
SHOW_EVERY_S = 0.5
STATUS: dict[str, Status] = {
    Trial.PENDING: "waiting",
    Trial.RUNNING: "running",
    Trial.PAUSED: "paused",
    Trial.TERMINATED: "stopped",
    Trial.ERROR: "failed",
}


class Watch:
    """Keeps the records of a sweep's trials.

    Args:
        mailbox: what trials say, and what they are told.
        keys: those that are searched, for the table.
    """

    def __init__(
        self, folder: SweepFolder, display: Display, mailbox: Any, measure: Measure, keys: list[str], stop: StopSignal
    ) -> None:
        self.records: dict[int, TrialRecord] = {record.number: record for record in folder.records()}
        self.unfinished = False
        """Whether Tune has left trials that it could go on with."""
        self._folder, self._display, self._mailbox = folder, display, mailbox
        self._measure, self._keys, self._stop = measure, keys, stop
        self._written = self._shown = 0.0
        self._interrupted = False
        self._runs: dict[int, str] = {}
        self._groups: dict[int, Any] = {}

    @property
    def in_order(self) -> list[TrialRecord]:
        """The records by their numbers."""
        return [self.records[number] for number in sorted(self.records)]

    def update(self, trials: list[Trial]) -> None:
        """Take over how Tune's trials stand, and what trials have said; called again and again."""
        if self._stop.received and not self._interrupted:
            self._interrupted = True
            self._display.note("SIGTERM: ending the trials; their complete checkpoints stay")
            os.kill(os.getpid(), signal.SIGINT)  # Tune ends a sweep in good order on it
        self._listen()
        changed = sum(self._update(trial) for trial in trials) > 0
        self.unfinished = any(not trial.is_finished() for trial in trials)
        self._write(changed)
        self._show(changed)

    def fail(self, trial: Trial) -> None:
        """A trial has failed."""
        self._listen()
        record = self._record(trial)
        record.reason = record.reason or _reason(trial)

    def retry(self, trial: Trial) -> None:
        """A trial has failed, and is tried again."""
        self._listen()
        record = self._record(trial)
        why = record.reason or _reason(trial)
        self._display.note(f"trial {record.name} failed at {_place(record)} and is tried again: {why}")
        record.reason = None

    def close(self) -> list[TrialRecord]:
        """Take in what is left; returns the records in order."""
        self._listen()
        for record in self.records.values():
            if record.status in ("running", "paused"):
                record.end("stopped")
        self._write(changed=True)
        return self.in_order

    def _record(self, trial: Trial) -> TrialRecord:
        number = trial_number(trial.trial_id, trial.config)
        values = trial.config[DRAW]["values"]
        return self.records.setdefault(number, TrialRecord(number, values))

    def _update(self, trial: Trial) -> bool:
        """Whether a trial's status has changed."""
        record, status = self._record(trial), STATUS[trial.status]
        if status == "stopped" and record.total_steps and record.step >= record.total_steps:
            status = "finished"
        if record.status == status:
            return False
        if record.status == "running" and record.number in self._runs:
            self._mailbox.end.remote(self._runs.pop(record.number))
            self._release(record.number, failed=status in ("failed", "waiting"))
        if status == "running":
            record.begin()
            self._display.log(f"trial {record.name} begins: {shown_values(record.values)}")
        elif status == "waiting":
            record.end("waiting")
        else:
            record.end(status, record.reason if status == "failed" else None)
            self._tell_end(record)
        return True

    def _release(self, number: int, failed: bool) -> None:
        """Give back what a trial's workers had: when its own process died, nobody else does it on a Ray without dashboard."""
        group = self._groups.pop(number, None)
        if failed and group is not None:
            remove_placement_group(group)

    def _tell_end(self, record: TrialRecord) -> None:
        metrics = self._shown_metrics(record)
        at = _place(record)
        if record.status == "failed":
            self._display.note(f"trial {record.name} failed at {at}: {record.reason or 'no reason is known'}")
        elif record.status == "paused":
            self._display.log(f"trial {record.name} is paused at {at}  {metrics}")
        else:
            how = "has finished" if record.status == "finished" else "ended early"
            self._display.log(f"trial {record.name} {how} at {at}  {metrics}")

    def _shown_metrics(self, record: TrialRecord) -> str:
        names = [one.metric for one in self._measure.objectives]
        return "  ".join(f"{name} {record.metrics[name]:.4g}" for name in names if name in record.metrics)

    def _listen(self) -> None:
        for said in ray.get(self._mailbox.take.remote()):
            self._hear(self.records[said["trial"]], said)

    def _hear(self, record: TrialRecord, said: dict[str, Any]) -> None:
        if "folder" not in said and said["run"] != self._runs.get(record.number) and "error" not in said:
            return  # the last words of a run that is over
        if "folder" in said:
            self._runs[record.number] = said["run"]
            record.folder, record.values = said["folder"], said["values"]
            if said["origin"] is not None:
                record.origins.append(said["origin"])
                self._display.note(f"trial {record.name} goes on from {said['origin']}: {shown_values(record.values)}")
        if "group" in said:
            self._groups[record.number] = said["group"]
        if "note" in said:
            self._display.note(f"trial {record.name}: {said['note']}")
        if "error" in said:
            record.reason = said["error"]
        if "step" in said:
            evaluated = said["metrics"] != record.metrics
            record.step, record.total_steps = said["step"], said["total_steps"]
            record.tokens, record.metrics = said["tokens"], said["metrics"]
            if evaluated:
                at = f"step {record.step}/{record.total_steps}"
                self._display.log(f"trial {record.name}  {at}  {self._shown_metrics(record)}{_left(record)}")

    def _write(self, changed: bool) -> None:
        if changed or time.monotonic() - self._written > WRITE_EVERY_S:
            self._written = time.monotonic()
            try:
                self._folder.write_records(self.in_order)
            except STORAGE_ERRORS:
                return  # a sweep doesn't fail for its log; the next call writes it

    def _show(self, changed: bool) -> None:
        if changed or time.monotonic() - self._shown > SHOW_EVERY_S:
            self._shown = time.monotonic()
            self._display.show(live_table(self.in_order, self._keys, self._measure))


def _place(record: TrialRecord) -> str:
    return f"step {record.step}/{record.total_steps}" if record.total_steps else "its start"


def _left(record: TrialRecord) -> str:
    left = record.time_left
    return f"  {timedelta(seconds=round(left))} left" if left else ""


def _reason(trial: Trial) -> str:
    """The last line of what Tune knows of a failure; a trial that could speak has said more."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else "its process died"


class Relayed(ray_tune.Callback):
    """Tune's callback; it is stored with Tune's state, so it holds nothing and knows the one watch of this process."""

    watch: Watch | None = None

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Tune has looked after its trials once more."""
        assert Relayed.watch is not None
        Relayed.watch.update(trials)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has failed, and is tried again."""
        assert Relayed.watch is not None
        Relayed.watch.retry(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has failed."""
        assert Relayed.watch is not None
        Relayed.watch.fail(trial)
