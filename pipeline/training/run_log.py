"""Handling of a run's events in the driver: shown, written to its folder, and passed to its trackers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeline.errors import RunFailed
from pipeline.io.retry import STORAGE_ERRORS, with_retries
from pipeline.io.storage import reason
from pipeline.runs.metrics import MetricsFile
from pipeline.training.events import AttemptStarted, ControllerStarted, Event, StepReport, WorkersFailed, WorkerStarted
from pipeline.training.hang_detection import HangDetector
from pipeline.training.row_ledger import batch_plan, planned_steps
from pipeline.ui.display import Display, clock_time

if TYPE_CHECKING:
    from pipeline.training.plan import TrainingPlan

__all__ = ["RunLogger"]


class RunLogger:
    """Shows, writes and tracks the events of a run, over all of its restarts.

    Args:
        plan: the run's.
        display: shows the events.
        hangs: receives workers and their steps.
    """

    def __init__(self, plan: TrainingPlan, display: Display, hangs: HangDetector) -> None:
        self.plan, self.display, self.hangs = plan, display, hangs
        self.metrics = MetricsFile(plan.folder.metrics)
        self.ledger = MetricsFile(plan.folder.ledger)
        self.restarts = 0
        self.has_failed = False
        """Whether workers have failed, whose scratch folders may be on nodes that have none of the later ones."""
        self.saved: set[str | None] = {None, plan.events.saved}
        """Checkpoints that were shown and tracked."""
        self.step = 0
        """The last reported step of this attempt."""
        self.nodes: set[str] = set()
        """Ray's ids of all nodes that had workers, in all attempts."""
        self.controller: Any = None
        """Ray Train's actor, once it runs."""

    def handle_events(self, events: Iterable[Event]) -> None:
        """Handle the events since the last call."""
        for event in events:
            match event:
                case WorkerStarted():
                    self.hangs.add(event.rank, event.actor, event.node, event.pid)
                    self.nodes.add(event.node_id)
                case ControllerStarted():
                    self.controller = event.actor
                case StepReport():
                    self._progress(event)
                case WorkersFailed():
                    self._fail(event)

    def flush_best_effort(self) -> None:
        """Write pending records if storage doesn't fail, when the run ends with an error."""
        self.metrics.flush_best_effort()
        self.ledger.flush_best_effort()

    def flush(self) -> None:
        """Write pending records, with retries.

        Raises:
            RunFailed: when they can't be written.
        """
        for file in (self.metrics, self.ledger):
            try:
                with_retries(file.flush, f"writing {file.path}")
            except STORAGE_ERRORS as error:
                raise RunFailed(f"{file.path} can't be written: {reason(error)}; the model is complete") from error

    def _progress(self, report: StepReport) -> None:
        self.step = report.step
        self.plan.events.step = self.step
        self.hangs.record_progress(self.step)
        if report.attempt is not None:
            # Before the records are appended: it drops those that they repeat.
            self._begin(report.attempt)
        self.metrics.append(report.records)
        # Trackers can't be rewound: `Tracking.log` leaves out what they have.
        self.plan.tracking.log(report.records)
        self.ledger.append(report.ledger)
        # The first report after a checkpoint also contains the checkpoint's log history, which has been shown before.
        shown = -1 if report.attempt is None else report.attempt.resumed_step or -1
        for record in report.records:
            if record["step"] > shown:
                self.display.record(record)
        self._note_checkpoint(report.checkpoint)

    def _note_checkpoint(self, name: str | None) -> None:
        """Show and track a checkpoint once: a restart also reports the one that it starts from, whose report may be lost."""
        if name is not None and name not in self.saved:
            self.saved.add(name)
            self.display.saved(name)
            self.plan.tracking.add_checkpoint(name)
            self.plan.events.note_saved(name)

    def _begin(self, attempt: AttemptStarted) -> None:
        """Handle the start of training: rewind the files, note the first step and how many steps are repeated."""
        step, repeated = attempt.resumed_step, attempt.repeated_steps
        self.metrics.rewind(step)
        self._rewind_ledger(step, attempt.skipped)
        self.display.stage("training")
        source = f"continuing from the checkpoint of step {step}" if step else "starting again"
        lost = f": {repeated} step{'s are' if repeated != 1 else ' is'} repeated" if repeated else ""
        if step or lost:
            self.display.note(source + lost)
        for note in attempt.notes:
            self.display.note(note)
        self.plan.events.add(
            "training", step=step, nodes=self.hangs.nodes, repeated=repeated, notes=attempt.notes, setup=attempt.setup
        )

    def _rewind_ledger(self, step: int, skipped: list[int]) -> None:
        """Drop entries that will be repeated; rebuild those that a lost driver hadn't written from the batch plan."""
        self.ledger.rewind(step)
        written = {record["step"] for record in self.ledger.read()}
        missing = [number for number in range(1, step + 1) if number not in written]
        batches = batch_plan(self.plan)
        # Reading the rows takes a while, and is needed only after a driver was lost.
        if missing and batches is not None:
            self.ledger.append(planned_steps(batches, self.plan.row_ids(), missing, skipped))

    def _fail(self, event: WorkersFailed) -> None:
        """Note what failed and when, and the step that a restart begins from."""
        # The heartbeats' step is later than the reports', but unknown where no worker answered yet.
        step = max(self.step, self.hangs.step)
        self.has_failed = True
        self.plan.events.step = step
        failed = []
        for rank, why in event.failures.items():
            what = "died" if rank in event.died else "failed"
            why = "it hung" if rank in self.hangs.hung else why
            self.display.note(f"{self.hangs.name(rank)} {what} at {clock_time(event.time)} after step {step}: {why}")
            if rank in self.hangs.hung:
                what, why = "hung", self.hangs.hung[rank].partition(" hung: ")[2]
            failed.append({"rank": rank, "node": self.hangs.node(rank), "what": what, "why": why})
        # Last: the notes above name the workers' nodes.
        self.hangs.clear()
        self.step = self.plan.folder.last_checkpoint()
        most, restart = self.plan.cfg.ray.max_failures, None
        # Counted as Ray Train does, which restarts `max_failures` times over the whole run.
        source = f"the checkpoint of step {self.step}" if self.step else "the beginning"
        if event.spared:
            restart = 0
            self.display.note(f"restarting from {source}; {event.spared}")
        elif self.restarts < most:
            self.restarts = restart = self.restarts + 1
            self.display.note(f"restarting from {source} (restart {restart} of {most})")
        self.plan.events.add("failure", step=step, workers=failed, restart=restart)
