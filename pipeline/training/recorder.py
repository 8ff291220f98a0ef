"""What workers and Ray's controller tell of a run: shown, written into its folder, and told to its trackers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.display import Display, clock_time
from pipeline.errors import RunFailed
from pipeline.patience import STORAGE_ERRORS, patiently
from pipeline.storage import reason
from pipeline.training.ledger import batch_plan, planned_steps
from pipeline.training.metrics import MetricsFile
from pipeline.training.watching import Watch

if TYPE_CHECKING:
    from pipeline.training.following import RunPlan

__all__ = ["Recorder"]


class Recorder:
    """Takes the events of a run, over all of its restarts.

    Args:
        plan: the run's.
        display: shows them.
        watch: is told of workers and of their signs of life.
    """

    def __init__(self, plan: RunPlan, display: Display, watch: Watch) -> None:
        self.plan, self.display, self.watch = plan, display, watch
        self.metrics = MetricsFile(plan.folder.metrics)
        self.ledger = MetricsFile(plan.folder.ledger)
        self.restarts = 0
        self.step = 0
        """The last one that was heard of in this attempt."""
        self.controller: Any = None
        """Ray Train's, once it has said that it is there."""

    def take(self, events: Iterator[dict[str, Any]]) -> None:
        """Take what has happened since the last time."""
        for event in events:
            match event["event"]:
                case "worker":
                    self.watch.add(event["rank"], event["actor"], event["node"], event["pid"])
                    if self.plan.control is not None:
                        self.plan.control.workers_started(event["group"])
                case "controller":
                    self.controller = event["actor"]
                case "failure":
                    self._fail(event)
                case _:
                    self._progress(event)

    def settle(self) -> None:
        """Write what can be written now: the run ends early."""
        self.metrics.settle()
        self.ledger.settle()

    def flush(self) -> None:
        """Write everything, however long storage takes.

        Raises:
            RunFailed: when it can't be written.
        """
        for file in (self.metrics, self.ledger):
            try:
                patiently(file.flush, f"writing {file.path}")
            except STORAGE_ERRORS as error:
                raise RunFailed(f"{file.path} can't be written: {reason(error)}; the model is complete") from error

    def _progress(self, event: dict[str, Any]) -> None:
        self.step = event["step"]
        self.plan.history.step = self.step
        self.watch.hear(self.step)
        if "resumed" in event:
            self._begin(event)
        self.metrics.append(event["records"])
        self.plan.tracking.log(event["records"])
        self.ledger.append(event["ledger"])
        # A checkpoint's own history comes along with the first report after it; it has been shown before.
        known = event.get("resumed") or -1
        for record in event["records"]:
            if record["step"] > known:
                self.display.record(record)
        if "checkpoint" in event:
            self.display.saved(event["checkpoint"])
            self.plan.tracking.add_checkpoint(event["checkpoint"])

    def _begin(self, event: dict[str, Any]) -> None:
        """Workers have begun to train: say where, and how much work was lost."""
        step, repeated = event["resumed"], event["repeated"]
        self.metrics.rewind(step)
        self._rewind_ledger(step, event["skipped"])
        self.display.stage("training")
        source = f"continuing from the checkpoint of step {step}" if step else "starting again"
        lost = f": {repeated} step{'s are' if repeated != 1 else ' is'} repeated" if repeated else ""
        if step or lost:
            self.display.note(source + lost)
        for note in event["notes"]:
            self.display.note(note)
        told = {name: event[name] for name in ("repeated", "notes", "setup")}
        self.plan.history.add("training", step=step, nodes=self.watch.nodes, **told)

    def _rewind_ledger(self, step: int, skipped: list[int]) -> None:
        """Drop what is about to be repeated; what a lost driver has not written follows from the plan."""
        self.ledger.rewind(step)
        written = {record["step"] for record in self.ledger.read()}
        missing = [number for number in range(1, step + 1) if number not in written]
        batches = batch_plan(self.plan)
        if missing and batches is not None:
            row_ids = self.plan.prepared.read("train", ["row_id"])["row_id"].to_pylist()
            self.ledger.append(planned_steps(batches, row_ids, missing, skipped))

    def _fail(self, event: dict[str, Any]) -> None:
        """Say what failed, when, and what a restart will repeat."""
        step = max(self.step, self.watch.step)
        self.plan.history.step = step
        found = []
        for rank, why in event["failures"].items():
            what = "died" if rank in event["died"] else "failed"
            why = "it hung" if rank in self.watch.hung else why
            self.display.note(f"{self.watch.name(rank)} {what} at {clock_time(event['time'])} after step {step}: {why}")
            if rank in self.watch.hung:
                what, why = "hung", self.watch.hung[rank].partition(" hung: ")[2]
            found.append({"rank": rank, "node": self.watch.node(rank), "what": what, "why": why})
        self.watch.leave()
        self.step = self.plan.folder.last_checkpoint()
        most, restart = self.plan.cfg.ray.max_failures, None
        if self.restarts < most:
            self.restarts = restart = self.restarts + 1
            source = f"the checkpoint of step {self.step}" if self.step else "the beginning"
            self.display.note(f"restarting from {source} (restart {restart} of {most})")
        self.plan.history.add("failure", step=step, workers=found, restart=restart)
