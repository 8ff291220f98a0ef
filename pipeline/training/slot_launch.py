"""Trains a run in a slot of a host: what `launch.py` does for a run with workers of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from cluster.division import divided_layers
from pipeline.errors import RunCancelled, RunFailed, RunStopped, UserError
from pipeline.io.holder import Holder, here
from pipeline.ray.channel import NodeChannel
from pipeline.runs.scratch import remove_everywhere
from pipeline.training.events import SlotEnded, SlotGiven, WorkersFailed
from pipeline.training.hang_detection import HangDetector
from pipeline.training.job import WorkerJob
from pipeline.training.launch import run_training, worker_job
from pipeline.training.plan import TrainingPlan
from pipeline.training.run_log import RunLogger
from pipeline.training.signals import SigtermHandler
from pipeline.ui.display import Display

__all__ = ["SlotLauncher", "SlotLeft", "SlotUnwanted", "SlotWanted", "train_in_slot"]

POLL_EVERY_S = 0.04
"""Of many runs on one node; the end of each is waited for by the next one in its slot."""
LEAVE_WITHIN_S = 25.0
"""Seconds in which a run leaves its slot: after the step that it is in."""


@dataclass(frozen=True)
class SlotWanted:
    """A run asks the hosts' driver for a slot."""

    name: str
    """Its own among all runs."""
    job: WorkerJob
    events: NodeChannel
    """To which its events are sent."""
    driver: Holder
    """The process that has asked, on this node."""
    failures: int = 0
    """Those that have counted for it until now."""


@dataclass(frozen=True)
class SlotUnwanted:
    """A run leaves its slot, or doesn't wait for one any more."""

    name: str


@dataclass(frozen=True)
class SlotLeft:
    """A run knows that it has left its slot: its worker may have died before it reported that to the host, too."""

    name: str


def train_in_slot(
    hosts: NodeChannel,
    plan: TrainingPlan,
    display: Display,
    placed: Callable[[int | None, str], None] = lambda host, why: None,
    beside: SigtermHandler | None = None,
) -> dict[str, Any]:
    """Train a run in a slot, and if it may do better without others, with workers of its own; as `run_training`.

    Args:
        hosts: of the hosts' driver, on this node.
        plan, display, beside: as in `run_training`.
        placed: called with the number of the host where the run has a slot, and with None and why when it gets its own workers.

    Raises:
        RunFailed: also for a run that is out of memory and has checkpoints from which such workers can't resume.
    """
    with NodeChannel.opened() as channel:
        launcher = SlotLauncher(hosts, plan, display, channel, placed, beside)
        returned = launcher.run()
    if not isinstance(returned, str):
        return returned
    if divided_layers(plan.cfg) is not None and (step := plan.folder.last_checkpoint()):
        raise RunFailed(
            f"{returned}, after the checkpoint of step {step}, from which workers of its own can't resume, for they divide the "
            "adapter, too; for memory, lower micro_batch_size, tokens_per_forward or tune.slots"
        )
    placed(None, returned)
    display.note(f"{returned}: it is tried again with workers of its own")
    try:
        return run_training(plan, display, beside)
    finally:
        launcher.remove_scratch()


class SlotLauncher:
    """Waits for a slot, and handles the run's events until it has left.

    Args:
        hosts: of the hosts' driver.
        plan: the run's.
        display: shows stages, records and notes.
        channel: carries the run's events.
        placed: called with the number of the host on which the run has a slot, and an empty text.
        beside: as in `run_training`.
    """

    def __init__(
        self,
        hosts: NodeChannel,
        plan: TrainingPlan,
        display: Display,
        channel: NodeChannel,
        placed: Callable[[int, str], None] = lambda host, why: None,
        beside: SigtermHandler | None = None,
    ) -> None:
        self.hosts, self.plan, self.display, self.channel, self.placed = hosts, plan, display, channel, placed
        self.beside = beside or SigtermHandler()
        self._is_leaving = False
        self.known = plan.folder.known()
        # It watches no workers: the hosts' driver does.
        self.log = RunLogger(plan, display, HangDetector(plan.cfg.ray.hang_timeout))
        self.name = uuid4().hex

    def run(self) -> dict[str, Any] | str:
        """Return rank 0's result; a text says why it should be tried without others beside it.

        An error that the run raises is no end as long as it has restarts left: it resumes in another slot, or the same one.

        Raises:
            UserError, RunFailed, RunCancelled: as `run_training`.
        """
        ended = self._attempt()
        while self._begins_again(ended):
            ended = self._attempt()
        if ended.result is None or {"refused", "stopped"} & ended.result.keys():
            self.log.flush_best_effort()
        else:
            self.log.flush()
        if not ended.try_alone:  # with workers of its own it has the same folders
            self.remove_scratch(failed=ended.result is None)
        return self._judged(ended)

    def _attempt(self) -> SlotEnded:
        """Ask for a slot, and handle events until the run has left it."""
        # Of this attempt: the host may still report the end of the one before.
        self.name = uuid4().hex
        self.display.stage("waiting for a slot", total=self.plan.steps)
        job = worker_job(self.plan, self.known, storage=self.plan.folder.storage.carried(), channel=self.channel)
        self.hosts.put(SlotWanted(self.name, job, self.channel, here(), self.log.restarts))
        try:
            ended = self._wait()
        except BaseException:
            self._leave()
            raise
        with suppress(OSError):  # a full disk, or hosts that have ended
            self.hosts.put(SlotLeft(self.name))
        return ended

    def _begins_again(self, ended: SlotEnded) -> bool:
        """Return whether another attempt follows, as Ray Train restarts workers of a run's own; note why."""
        if not ended.has_raised or self._is_leaving or self.log.restarts >= self.plan.cfg.ray.max_failures:
            return False
        self.log.handle_events([WorkersFailed({0: ended.failure}, [], time.time())])
        return True

    def _wait(self) -> SlotEnded:
        """Handle events until the run has left its slot."""
        while True:
            if (ended := self._take()) is not None:
                return ended
            if self.plan.owner.is_lost:
                raise RunFailed(self.plan.owner.message())
            if self.plan.cancel is not None and self.plan.cancel.is_set():
                raise RunCancelled(f"the run in {self.plan.folder.path} was ended after step {self.log.step}")
            for note in self.plan.tracking.notes():
                self.display.note(note)
            if self.beside.received and not self._is_leaving:
                self._is_leaving = True
                self.display.note("SIGTERM: saving after this step; a second one stops at once")
                self.hosts.put(SlotUnwanted(self.name))
            time.sleep(POLL_EVERY_S)

    def _take(self) -> SlotEnded | None:
        events = list(self.channel.take())
        for event in events:
            if isinstance(event, SlotGiven):
                self.placed(event.host, "")
        self.log.handle_events(event for event in events if not isinstance(event, SlotEnded))
        return next((event for event in events if isinstance(event, SlotEnded) and event.name == self.name), None)

    def _leave(self) -> None:
        """Leave the slot, after the step that the run is in, and write what it has reported."""
        with suppress(FileNotFoundError):  # the hosts have ended
            self.hosts.put(SlotUnwanted(self.name))
        deadline = time.monotonic() + LEAVE_WITHIN_S
        while (ended := self._take()) is None and time.monotonic() < deadline and self.hosts.folder.exists():
            time.sleep(POLL_EVERY_S)
        self.log.flush_best_effort()
        # In a step that takes longer it still writes there.
        if ended is not None:
            self.remove_scratch(failed=ended.result is None)

    def _judged(self, ended: SlotEnded) -> dict[str, Any] | str:
        folder = self.plan.folder
        if ended.try_alone:
            return ended.failure
        if ended.refused:
            raise UserError(ended.failure)
        if ended.result is None:
            raise RunFailed(f"training failed: {ended.failure} ({folder.remains(', continue with --resume')})")
        if "refused" in ended.result:
            raise UserError(f"{ended.result['refused']} ({folder.remains(', continue with --resume')})")
        if "stopped" in ended.result and self.beside.received:
            raise RunStopped(f"stopped by SIGTERM: {folder.remains()}; continue with --resume")
        if "stopped" in ended.result:
            raise RunCancelled(f"the run in {folder.path} was ended after step {ended.result['step']}")
        return ended.result

    def remove_scratch(self, failed: bool = False) -> None:
        """Delete the scratch folders of workers that have died; others do it themselves.

        Args:
            failed: whether they may have died without a word.
        """
        if failed or self.log.has_failed:
            remove_everywhere(self.known["scratch"], self.log.nodes)
