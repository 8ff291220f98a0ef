"""Trains a run in a slot of a host: what `launch.py` does for a run with workers of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from pipeline.errors import RunCancelled, RunFailed, RunStopped, UserError
from pipeline.io.holder import Holder, here
from pipeline.ray.channel import NodeChannel
from pipeline.runs.scratch import remove_everywhere
from pipeline.training.events import SlotEnded
from pipeline.training.hang_detection import HangDetector
from pipeline.training.job import WorkerJob
from pipeline.training.launch import POLL_EVERY_S, run_training, worker_job
from pipeline.training.plan import TrainingPlan
from pipeline.training.run_log import RunLogger
from pipeline.training.signals import SigtermHandler
from pipeline.ui.display import Display

__all__ = ["SlotWanted", "SlotLauncher", "SlotUnwanted", "train_in_slot"]

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


@dataclass(frozen=True)
class SlotUnwanted:
    """A run leaves its slot, or doesn't wait for one any more."""

    name: str


def train_in_slot(
    hosts: NodeChannel, plan: TrainingPlan, display: Display, beside: SigtermHandler | None = None
) -> dict[str, Any]:
    """Train a run in a slot, and if it runs out of memory there, with workers of its own; as `run_training`.

    Args:
        hosts: of the hosts' driver, on this node.
        plan, display, beside: as in `run_training`.
    """
    with NodeChannel.opened() as channel:
        returned = SlotLauncher(hosts, plan, display, channel, beside).run()
    if returned is not None:
        return returned
    display.note("it ran out of memory beside other runs, and is tried again with workers of its own")
    return run_training(plan, display, beside)


class SlotLauncher:
    """Waits for a slot, and handles the run's events until it has left.

    Args:
        hosts: of the hosts' driver.
        plan: the run's.
        display: shows stages, records and notes.
        channel: carries the run's events.
        beside: as in `run_training`.
    """

    def __init__(
        self,
        hosts: NodeChannel,
        plan: TrainingPlan,
        display: Display,
        channel: NodeChannel,
        beside: SigtermHandler | None = None,
    ) -> None:
        self.hosts, self.plan, self.display, self.channel = hosts, plan, display, channel
        self.beside = beside or SigtermHandler()
        self._is_leaving = False
        self.known = plan.folder.known()
        # It knows no workers: the hosts' driver watches those.
        self.log = RunLogger(plan, display, HangDetector(plan.cfg.ray.hang_timeout))
        self.name = uuid4().hex

    def run(self) -> dict[str, Any] | None:
        """Return rank 0's result; None when the run was out of memory.

        Raises:
            UserError, RunFailed, RunCancelled: as `run_training`.
        """
        self.display.stage("waiting for a slot", total=self.plan.steps)
        job = worker_job(self.plan, self.known, storage=self.plan.folder.storage.carried(), channel=self.channel)
        self.hosts.put(SlotWanted(self.name, job, self.channel, here()))
        try:
            ended = self._wait()
        except BaseException:
            self._leave()
            raise
        if ended.result is None or {"refused", "stopped"} & ended.result.keys():
            self.log.flush_best_effort()
            self._remove_scratch()
        else:
            self.log.flush()
        return self._judged(ended)

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
        self.log.handle_events(event for event in events if not isinstance(event, SlotEnded))
        return next((event for event in events if isinstance(event, SlotEnded)), None)

    def _leave(self) -> None:
        """Leave the slot, after the step that the run is in, and write what it has reported."""
        self.hosts.put(SlotUnwanted(self.name))
        deadline = time.monotonic() + LEAVE_WITHIN_S
        while self._take() is None and time.monotonic() < deadline:
            time.sleep(POLL_EVERY_S)
        self.log.flush_best_effort()
        self._remove_scratch()

    def _judged(self, ended: SlotEnded) -> dict[str, Any] | None:
        folder = self.plan.folder
        if ended.out_of_memory:
            return None
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

    def _remove_scratch(self) -> None:
        remove_everywhere(self.known["scratch"], self.log.nodes)
