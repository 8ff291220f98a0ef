"""Threads in which runs train: one with workers of its own, or several in slots of hosts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from cluster.placement import WorkerPlan
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.ray.channel import NodeChannel
from pipeline.training.host import HostPlan, Hosts
from pipeline.training.launch import run_training
from pipeline.training.signals import SigtermHandler
from pipeline.training.slot_launch import train_in_slot
from pipeline.training.together.run import OneRun, listed, reason_of

__all__ = ["HOST", "Job"]

HOST = ".host"
"""Folder that Ray Train needs for a host, in that of one of its runs; it is deleted when the host has ended."""


class Job:
    """Runs that begin at once, in threads: those that share a base, or a single one.

    Args:
        runs: they.
        hosts: of the base that they share; None for a single one.
        stop: of the main thread.
        note: shows a message.
    """

    def __init__(self, runs: list[OneRun], hosts: HostPlan | None, stop: SigtermHandler, note: Callable[[str], None]) -> None:
        self.runs, self._hosts, self._stop, self._note = runs, hosts, stop, note
        self._thread = threading.Thread(target=self._train, name=f"training {runs[0].name}", daemon=True)

    @property
    def workers(self) -> list[WorkerPlan]:
        """Groups of workers that it needs at once."""
        return [self.runs[0].plan.workers] * (1 if self._hosts is None else self._hosts.hosts)

    @property
    def has_begun(self) -> bool:
        """Whether it was started."""
        return self._thread.ident is not None

    @property
    def has_ended(self) -> bool:
        """Whether its runs have trained, and its workers have ended."""
        return self.has_begun and not self._thread.is_alive()

    def start(self) -> None:
        """Train its runs."""
        self._thread.start()

    def _train(self) -> None:
        try:
            if self._hosts is None:
                self.runs[0].train(partial(run_training, beside=self._stop))
            else:
                self._train_on_hosts(self._hosts)
        except BaseException as error:  # noqa: BLE001 - raised in the other thread, by the runs
            for run in self.runs:
                run.give_up(error)
            self._note(f"the workers of {listed(self.runs)}: {reason_of(error)}")

    def _train_on_hosts(self, plan: HostPlan) -> None:
        folder = self.runs[0].plan.folder.storage
        try:
            with NodeChannel.opened() as channel, Hosts(plan, channel, self._note):
                launch = partial(train_in_slot, channel, beside=self._stop)
                threads = [threading.Thread(target=run.train, args=(launch,), name=run.name, daemon=True) for run in self.runs]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        finally:
            with suppress(*STORAGE_ERRORS):
                folder.delete(HOST)
