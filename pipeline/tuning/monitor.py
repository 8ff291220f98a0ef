"""Monitoring of a sweep on the driver: Tune's trial states and the trials' events become records, log lines and a table."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback

from cluster.ray_compat import remove_orphaned_groups
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.runs.owner import Ownership
from pipeline.training.signals import SigtermHandler
from pipeline.tuning.channel import SweepChannel, TrialBegan, TrialEvent, TrialFault, TrialNote, TrialPlaced, TrialProgress
from pipeline.tuning.control import TrialControl
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.records import Status, TrialRecord, keys_of
from pipeline.tuning.search import SAMPLE, trial_number
from pipeline.tuning.sharing import Sharing
from pipeline.tuning.space import shown_values
from pipeline.tuning.table import hosts_line, trials_table
from pipeline.ui.display import Display

__all__ = ["MonitorCallback", "QuietProgress", "SweepMonitor"]


WRITE_EVERY_S = 2.0
SHOW_EVERY_S = 0.5
ORPHANS_EVERY_S = 0.5
DYING_S = 60.0
"""Seconds in which Ray notices that the owner of a process has died."""
STATUS: dict[str, Status] = {
    Trial.PENDING: "waiting",
    Trial.RUNNING: "running",
    Trial.PAUSED: "paused",
    Trial.TERMINATED: "stopped",
    Trial.ERROR: "failed",
}


class SweepMonitor:
    """Keeps the records of a sweep's trials up to date.

    Args:
        channel: carries the trials' events.
        keys: the searched keys, for the table.
        stop: received SIGTERMs.
        control: carries out other processes' requests.
        sharing: the base that trials share.
    """

    def __init__(
        self,
        folder: SweepFolder,
        display: Display,
        channel: SweepChannel,
        measure: SweepObjective,
        keys: list[str],
        stop: SigtermHandler,
        owner: Ownership,
        control: TrialControl,
        sharing: Sharing | None = None,
    ) -> None:
        self.records: dict[int, TrialRecord] = {record.number: record for record in folder.records()}
        self.unfinished = False
        """Whether Tune has trials left that a resumed sweep would run."""
        self._folder, self._display, self._channel = folder, display, channel
        self._measure, self._keys, self._stop, self._owner = measure, keys, stop, owner
        self._control, self._sharing = control, sharing
        self._first: dict[int, tuple[float, int]] = {}
        """Trial -> time and tokens of its first report, in its last attempt."""
        self._written = self._shown = 0.0
        self._interrupted = False
        self._runs: dict[int, str] = {}
        self._orphans_until, self._orphans_seen = time.monotonic() + DYING_S, 0.0
        """Until when processes of a failed trial, or of the search before, may still die, and when their placement groups were
        last looked for."""
        self._early: list[TrialEvent] = []
        """Events of trials that Tune hasn't shown yet."""

    @property
    def in_order(self) -> list[TrialRecord]:
        """The records, ordered by trial number."""
        return [self.records[number] for number in sorted(self.records)]

    def update(self, trials: list[Trial]) -> None:
        """Update records from Tune's trial states and pending trial events. Called at every Tune step."""
        # Once: Tune takes a second SIGINT as a wish to skip saving its state.
        if (self._stop.received or self._owner.is_lost) and not self._interrupted:
            self._interrupted = True
            if self._stop.received:
                self._display.note("SIGTERM: ending the trials; their complete checkpoints stay")
            os.kill(os.getpid(), signal.SIGINT)  # Tune handles SIGINT by saving its state and stopping all trials
        self._apply_events()
        changed = sum(self._update(trial) for trial in trials) > 0
        self.unfinished = any(not trial.is_finished() for trial in trials)
        self._control.serve(self.records, self._display.note)
        self._remove_orphans()
        self._write(changed)
        self._show(changed)

    def fail(self, trial: Trial) -> None:
        """Record why a trial has failed."""
        self._apply_events()
        record = self._record(trial)
        # The run's own message, where it could send one, rather than Tune's traceback.
        record.reason = record.reason or _reason(trial)

    def retry(self, trial: Trial) -> None:
        """Report a failed trial that Tune retries."""
        self._apply_events()
        record = self._record(trial)
        why = record.reason or _reason(trial)
        self._display.note(f"trial {record.name} failed at {_position(record)} and is tried again: {why}")
        record.reason = None

    def close(self) -> list[TrialRecord]:
        """Apply the last events, mark running trials as stopped, and return the records in order."""
        self._apply_events()
        # When Tune has returned no trial runs any more, whatever the last state was that it passed on.
        for record in self.records.values():
            if record.status in ("running", "paused"):
                record.end("stopped")
        self._write(changed=True)
        return self.in_order

    def _remove_orphans(self) -> None:
        """Free the workers' resources of trials whose process died; otherwise another attempt would wait for them forever."""
        now = time.monotonic()
        if now < self._orphans_until and now - self._orphans_seen > ORPHANS_EVERY_S:
            self._orphans_seen = now
            remove_orphaned_groups()

    def _record(self, trial: Trial) -> TrialRecord:
        number = trial_number(trial.trial_id, trial.config)
        drawn = trial.config[SAMPLE]
        related = {name: drawn.get(name) for name in ("repeats", "clone_of")}
        return self.records.setdefault(number, TrialRecord(number, drawn["values"], **related))

    def _update(self, trial: Trial) -> bool:
        """Update a trial's record; return whether its status has changed."""
        record, status = self._record(trial), STATUS[trial.status]
        # To Tune both are TERMINATED: it doesn't know how many steps a trial has.
        if status == "stopped" and record.total_steps and record.step >= record.total_steps:
            status = "finished"
        if record.status == status:
            return False
        # Tune cancels a trial only between its evaluations: also mark its run, which polls the channel.
        if record.status == "running" and record.number in self._runs:
            self._channel.end(self._runs.pop(record.number))
            if status in ("failed", "waiting"):
                self._orphans_until = time.monotonic() + DYING_S
        if status == "running":
            record.begin()
            self._display.log(f"trial {record.name} begins: {shown_values(record.values)}")
        elif status == "waiting":
            record.end("waiting")
        else:
            record.end(status, record.reason if status == "failed" else None)
            self._report_end(record)
        return True

    def _report_end(self, record: TrialRecord) -> None:
        metrics = self._shown_metrics(record)
        at = _position(record)
        if record.status == "failed":
            self._display.note(f"trial {record.name} failed at {at}: {record.reason or 'no reason is known'}")
        elif record.status == "paused":
            self._display.log(f"trial {record.name} is paused at {at}  {metrics}")
        else:
            how = "has finished" if record.status == "finished" else "ended early"
            self._display.log(f"trial {record.name} {how} at {at}  {metrics}")

    def _shown_metrics(self, record: TrialRecord) -> str:
        names = [objective.metric for objective in self._measure.objectives]
        return "  ".join(f"{name} {record.metrics[name]:.4g}" for name in names if name in record.metrics)

    def _apply_events(self) -> None:
        # Tune may not have shown a trial yet that has begun; what it sends first is taken with its next event.
        self._early += self._channel.take()
        known = [event for event in self._early if event.trial in self.records]
        self._early = [event for event in self._early if event.trial not in self.records]
        for event in known:
            self._apply(self.records[event.trial], event)

    def _apply(self, record: TrialRecord, event: TrialEvent) -> None:
        is_late = event.run != self._runs.get(record.number)  # of a run that has ended
        match event:
            case TrialBegan():
                self._runs[record.number] = event.run
                self._first.pop(record.number, None)
                record.folder, record.values = event.folder, event.values
                if event.origin is not None:
                    record.origins.append(event.origin)
                    self._display.note(f"trial {record.name} goes on from {event.origin}: {shown_values(record.values)}")
            case TrialFault():
                record.reason = event.reason
            case TrialPlaced() if not is_late:
                record.enter(event.host, event.why)
            case TrialNote() if not is_late:
                self._display.note(f"trial {record.name}: {event.text}")
            case TrialProgress() if not is_late:
                # Every log record is an event; only those of evaluations are worth a line.
                evaluated = event.metrics != record.metrics
                record.step, record.total_steps = event.step, event.total_steps
                record.tokens, record.metrics = event.tokens, event.metrics
                record.operations, record.worker_seconds = event.cost.operations, event.cost.worker_seconds
                self._measure_speed(record)
                if evaluated:
                    at = f"step {record.step}/{record.total_steps}"
                    self._display.log(f"trial {record.name}  {at}  {self._shown_metrics(record)}{_shown_time_left(record)}")

    def _measure_speed(self, record: TrialRecord) -> None:
        now = time.monotonic()
        began, tokens = self._first.get(record.number, (now, record.tokens))
        if record.tokens <= tokens:  # its first report, also after a restart
            began, tokens = self._first[record.number] = now, record.tokens
        if now > began:
            record.speed = (record.tokens - tokens) / (now - began)

    def _write(self, changed: bool) -> None:
        if not self._owner.is_lost and (changed or time.monotonic() - self._written > WRITE_EVERY_S):
            self._written = time.monotonic()
            try:
                self._folder.write_records(self.in_order)
            except STORAGE_ERRORS:
                return  # a sweep doesn't fail for its log; the next call writes it

    def _show(self, changed: bool) -> None:
        if changed or time.monotonic() - self._shown > SHOW_EVERY_S:
            self._shown = time.monotonic()
            keys = keys_of(self._keys, self.in_order)
            shared = self._sharing
            hosts = "" if shared is None else hosts_line(self.in_order, shared.hosts, shared.slots)
            self._display.show(trials_table(self.in_order, keys, self._measure, hosts))


def _position(record: TrialRecord) -> str:
    return f"step {record.step}/{record.total_steps}" if record.total_steps else "its start"


def _shown_time_left(record: TrialRecord) -> str:
    left = record.time_left
    return f"  {timedelta(seconds=round(left))} left" if left else ""


def _reason(trial: Trial) -> str:
    """Return the last line of Tune's error, for trials whose process died before it sent an error event."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1] if lines else "its process died"


class MonitorCallback(ray_tune.Callback):
    """Forwards Tune's events to the monitor: a class attribute, since Tune pickles its callbacks."""

    monitor: SweepMonitor | None = None

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Update the records after each step of Tune's control loop."""
        assert MonitorCallback.monitor is not None
        MonitorCallback.monitor.update(trials)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Report a failed trial that is retried."""
        assert MonitorCallback.monitor is not None
        MonitorCallback.monitor.retry(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Record the failure of a trial."""
        assert MonitorCallback.monitor is not None
        MonitorCallback.monitor.fail(trial)


class QuietProgress(TrialProgressCallback):
    """In place of Tune's own, which at verbosity 0 still prints a line for a trial that is ended on request."""

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Print nothing: the monitor reports it."""
