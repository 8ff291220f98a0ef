"""Which runs share a base, when each begins, and how all of them end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence

import ray

from cluster.placement import WorkerPlan, fit_at_once
from pipeline.doctor.memory import this_machine
from pipeline.errors import RunCancelled, RunFailed, RunStopped
from pipeline.io.storage import locate
from pipeline.ray.session import node_resources
from pipeline.runs.folder import RunFolder
from pipeline.runs.result import TrainResult
from pipeline.training.host import HostPlan
from pipeline.training.sharing import MOST_SLOTS, fitting_slots, group_by_base, why_not_shared
from pipeline.training.signals import SigtermHandler
from pipeline.training.together.display import TogetherDisplay
from pipeline.training.together.jobs import HOST, Job
from pipeline.training.together.run import OneRun, listed, reason_of

__all__ = ["RunsFailed", "Schedule"]

POLL_EVERY_S = 0.1


class RunsFailed(RunFailed):
    """Some of several runs have failed; the message says which, and why.

    Args:
        message: for the user.
        finished: name -> result of the other runs.
    """

    def __init__(self, message: str, finished: dict[str, TrainResult]) -> None:
        self.finished = finished
        super().__init__(message)


class Schedule:
    """Trains runs that are prepared, as many at once as the cluster has room for.

    Args:
        runs: they, and those that have ended.
        shared: shows them.
        debug: show the workers' output.
    """

    def __init__(self, runs: list[OneRun], shared: TogetherDisplay, debug: bool) -> None:
        self.runs, self.shared, self.debug = runs, shared, debug
        self.cancel = threading.Event()
        """Ends all runs."""

    def train(self, cancel: threading.Event) -> None:
        """Train the runs to their ends.

        Args:
            cancel: of the caller.

        Raises:
            RunsFailed: when some have failed. RunStopped: after SIGTERM, RunCancelled: after `cancel.set()`,
                KeyboardInterrupt: when the runs have ended.
        """
        ready = [run for run in self.runs if not run.has_ended]
        self.shared.begin_training()
        with SigtermHandler() as stop:
            jobs = self._plan_jobs(ready, stop)
            try:
                self._work(jobs, stop, cancel)
            except KeyboardInterrupt:
                self.cancel.set()
                self.shared.note("interrupted: ending the runs")
                self._work(jobs, stop, cancel)
                # As for a single run: Ray frees what aborted controllers have left.
                ray.shutdown()
                if not stop.received:
                    self.shared.note(self._what_remains("interrupted"))
                    raise
        if stop.received and any(run.error is not None for run in self.runs):
            raise RunStopped(self._what_remains("stopped by SIGTERM"))
        if self.cancel.is_set():
            raise RunCancelled(self._what_remains("the runs were ended"))
        if any(run.error is not None for run in self.runs):
            raise self._failure()

    def _plan_jobs(self, ready: list[OneRun], stop: SigtermHandler) -> list[Job]:
        """Put the runs that can share a base together, and note which do, and why others don't."""
        recipes = [run.plan.cfg for run in ready]
        groups = [[ready[index] for index in group] for group in group_by_base(recipes) if len(group) > 1]
        alone = [run for run in ready if not any(run in group for group in groups)]
        jobs = []
        for number, group in enumerate(groups):
            # What the others need is left to them.
            others = [*alone, *(other[0] for other in groups[:number]), *(other[0] for other in groups[number + 1 :])]
            jobs.append(Job(group, self._plan_hosts(group, [run.plan.workers for run in others]), stop, self.shared.note))
        for run in alone if len(ready) > 1 else ():
            run.display.note(f"it has workers of its own: {_why_alone(run, [*(group[0] for group in groups), *alone])}")
        jobs += [Job([run], None, stop, self.shared.note) for run in alone]
        return sorted(jobs, key=lambda job: ready.index(job.runs[0]))

    def _plan_hosts(self, group: list[OneRun], others: list[WorkerPlan]) -> HostPlan:
        """Decide on how many copies of their base runs train: as many as there is room for beside the other runs."""
        first = group[0].plan
        nodes, machine = node_resources(), this_machine(first.workers.use_gpu)
        most = max((n for n in range(1, len(group) + 1) if fit_at_once([*others, *[first.workers] * n], nodes)), default=1)
        for hosts in range(most, 0, -1):
            copies = 1 if machine.kind == "GPU" else hosts * first.workers.num_workers
            slots = min(-(-len(group) // hosts), MOST_SLOTS)
            fitting = fitting_slots((run.plan.cfg for run in group), copies, machine)
            if fitting >= slots:
                break
        of = f", of which there are {hosts}" if hosts > 1 else ""
        self.shared.note(f"{listed(group)} share one copy of the base model{of}")
        storage = first.folder.for_ray()
        storage |= {"name": "host", "storage_path": f"{first.folder.storage.path}/{HOST}"}
        return HostPlan(first, hosts, max(1, min(slots, fitting)), storage, os.getcwd(), self.debug)

    def _work(self, jobs: list[Job], stop: SigtermHandler, cancel: threading.Event) -> None:
        """Start jobs while there is room, and end runs that have trained, until all have ended."""
        while not all(run.has_ended for run in self.runs) or any(job.has_begun and not job.has_ended for job in jobs):
            if cancel.is_set():
                self.cancel.set()
            if stop.received or self.cancel.is_set():
                self._give_up(job for job in jobs if not job.has_begun)
            else:
                self._start(jobs)
            for run in self.runs:
                if run.has_trained.is_set() and not run.has_ended:
                    run.close()
            self.shared.show()
            time.sleep(POLL_EVERY_S)
        self.shared.show(always=True)

    def _start(self, jobs: list[Job]) -> None:
        """Start the jobs that there is room for beside those that run, and one in any case."""
        running = [job for job in jobs if job.has_begun and not job.has_ended]
        for job in jobs:
            taken = [workers for other in running for workers in other.workers]
            if not job.has_begun and (not running or fit_at_once([*taken, *job.workers], node_resources())):
                job.start()
                running.append(job)

    def _give_up(self, jobs: Iterable[Job]) -> None:
        for run in (run for job in jobs for run in job.runs):
            run.give_up(RunStopped(f"it had no room to train yet: {run.plan.folder.remains()}; continue with --resume"))

    def _failure(self) -> RunsFailed:
        failed = [run for run in self.runs if run.error is not None]
        have, it = ("has", "it") if len(failed) == 1 else ("have", "them")
        number = f"{len(failed)} of {len(self.runs)} runs {have} failed"
        lines = [f"{number}; the same command with --resume continues {it}, and leaves others as they are"]
        lines += [f"  {run.name}: {reason_of(run.error)}" for run in failed if run.error is not None]
        failure = RunsFailed("\n".join(lines), {run.name: run.result for run in self.runs if run.result is not None})
        failure.__cause__ = failed[0].error
        return failure

    def _what_remains(self, what: str) -> str:
        """Return a message on runs that were ended: what, how to continue, and what is left of each."""
        lines = [f"{what}; continue with the same command and --resume"]
        for run in self.runs:
            left = "finished" if run.result is not None else RunFolder(locate(run.cfg.output_dir)).remains()
            lines.append(f"  {run.name}: {left}")
        return "\n".join(lines)


def _why_alone(run: OneRun, others: Sequence[OneRun]) -> str:
    """Return why a run shares no base: neither that of the first other run that could, nor any."""
    able = [other for other in others if other is not run and not why_not_shared(other.plan.cfg)]
    reasons = why_not_shared(run.plan.cfg, able[0].plan.cfg if able else None)
    return "; ".join(f"{key}: {reason}" for key, reason in reasons) or "no other run can share a base"
