"""Finds workers that hang, in the driver.

Each worker is polled for its last heartbeat. Without a new one for `ray.hang_timeout` it hangs: its process is stopped (then it
doesn't answer), or its training is blocked (then it answers with the same heartbeat). Since all ranks wait for the one that
hangs, the one that is furthest behind is assumed to be it. It is killed, which Ray Train treats as a failed worker.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.training.heartbeat import Heartbeat, ask_to_stop, last_heartbeat
from pipeline.ui.display import clock_time

__all__ = ["HangDetector"]

ASK_EVERY_S = 5.0


@dataclass
class _Worker:
    actor: Any
    node: str
    pid: int
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    seen: float = field(default_factory=time.monotonic)
    """Monotonic time of the last new heartbeat; that clock stops while the machine sleeps."""
    reported: int = 0
    """The last step that was reported, which takes all workers."""
    asked: Any = None
    """The pending request for a heartbeat."""
    noted: str | None = None
    """What it waited for, by the last note."""


class HangDetector:
    """The workers of the current attempt.

    Args:
        timeout_s: `ray.hang_timeout`.

    Attributes:
        hung: rank -> description of each worker that was killed for hanging; cleared by the next attempt.
    """

    def __init__(self, timeout_s: float) -> None:
        self.hung: dict[int, str] = {}
        self._timeout_s = timeout_s
        self._every_s = min(ASK_EVERY_S, timeout_s / 4)
        self._workers: dict[int, _Worker] = {}
        self._last_asked = 0.0
        self._stopping = False

    def add(self, rank: int, actor: Any, node: str, pid: int) -> None:
        """Add a worker that has started."""
        if not self._workers:
            # Not in `clear`: a failed run's message names who hung after its workers are gone.
            self.hung = {}
        self._workers[rank] = _Worker(actor, node, pid)
        # Workers of a restart haven't received the request, which was sent to those before them.
        if self._stopping:
            actor.execute.remote(ask_to_stop)

    def clear(self) -> None:
        """Remove all workers: the attempt has ended."""
        self._workers = {}

    def node(self, rank: int) -> str | None:
        """Return the node of a worker; None where it isn't known."""
        worker = self._workers.get(rank)
        return worker.node if worker else None

    @property
    def nodes(self) -> dict[str, list[int]]:
        """Ranks on each node."""
        nodes: dict[str, list[int]] = {}
        for rank, worker in sorted(self._workers.items()):
            nodes.setdefault(worker.node, []).append(rank)
        return nodes

    def name(self, rank: int) -> str:
        """Return the name of a worker in messages, with its node."""
        node = self.node(rank)
        return f"worker {rank} on {node}" if node else f"worker {rank}"

    def record_progress(self, step: int) -> None:
        """Record a reported step, which counts as a heartbeat of every worker."""
        for worker in self._workers.values():
            # `ray.train.report` is a barrier: no rank was reported before all had reached this step.
            worker.reported, worker.seen = step, time.monotonic()

    @property
    def step(self) -> int:
        """The last known step of any worker in this attempt."""
        # Heartbeats also count the steps since the last report.
        return max((worker.heartbeat.step for worker in self._workers.values()), default=0)

    def stop(self) -> bool:
        """Request all workers to save and stop after the current step; return False where there are none."""
        self._stopping = True
        for worker in self._workers.values():
            worker.actor.execute.remote(ask_to_stop)
        return bool(self._workers)

    def check(self) -> list[str]:
        """Poll heartbeats, and kill workers that hang; return a note for each, and for what a worker has begun to wait for."""
        # After a kill the other ranks are silent too, until Ray Train has noticed and ended the attempt.
        if self.hung or time.monotonic() - self._last_asked < self._every_s:
            return []
        self._last_asked = time.monotonic()
        notes = [note for rank, worker in self._workers.items() if (note := self._poll(rank, worker)) is not None]
        if not any(self._is_silent(worker) for worker in self._workers.values()):
            return notes
        return [*notes, *(self._kill(rank) for rank in self._stalled_ranks())]

    def _poll(self, rank: int, worker: _Worker) -> str | None:
        """Read the pending answer, if it is ready, and request the next heartbeat; return a note for what it waits for."""
        import ray

        # One request at a time: for a stopped process they would pile up in its actor's queue.
        waited = worker.heartbeat.waiting
        if worker.asked is not None and ray.wait([worker.asked], timeout=0)[0]:
            answer, worker.asked = worker.asked, None
            try:
                heartbeat = ray.get(answer)
            except ray.exceptions.RayError:
                return None  # it has died, which Ray Train will report
            if heartbeat != worker.heartbeat:
                worker.seen = time.monotonic()
            worker.heartbeat = heartbeat
        if worker.asked is None:
            worker.asked = worker.actor.execute.remote(last_heartbeat)
        # Twice: most waits are over before the next poll.
        waiting = worker.heartbeat.waiting
        if waiting is None or waiting != waited or waiting == worker.noted:
            return None
        worker.noted = waiting
        return f"{self.name(rank)} is waiting for {waiting}"

    def _is_silent(self, worker: _Worker) -> bool:
        # Ranks that have finished beat no more, while others may still upload.
        return not worker.heartbeat.over and time.monotonic() - worker.seen > self._timeout_s

    def _stalled_ranks(self) -> list[int]:
        """Return the ranks that don't answer; if all do, those that are furthest behind."""
        late = {rank: worker for rank, worker in self._workers.items() if not worker.heartbeat.over and rank not in self.hung}
        # A process that doesn't answer is surely the cause; where all answer, the least heartbeats show who blocks the others.
        mute = [rank for rank, worker in late.items() if self._is_silent(worker) and self._is_mute(worker)]
        least = min((worker.heartbeat.count for worker in late.values()), default=0)
        return mute or [rank for rank, worker in late.items() if worker.heartbeat.count == least and self._is_silent(worker)]

    def _is_mute(self, worker: _Worker) -> bool:
        import ray

        # A second, since `_poll` may have sent the request a moment ago.
        return worker.asked is not None and not ray.wait([worker.asked], timeout=1)[0]

    def _kill(self, rank: int) -> str:
        import ray

        worker = self._workers[rank]
        # `seen` is monotonic: its age is subtracted from the wall clock to show a time of day.
        since, step = clock_time(time.time() - (time.monotonic() - worker.seen)), max(worker.heartbeat.step, worker.reported)
        self.hung[rank] = f"{self.name(rank)} hung: no sign of life since {since}, after step {step}"
        ray.kill(worker.actor)
        return f"{self.hung[rank]} (ray.hang_timeout: {self._timeout_s:g} s); killed"
