"""The driver's eye on the workers: where they are, how far they are, and which of them hangs.

Every worker says once where it runs; from then on it is asked for its last sign of life. One that gives no new sign for
`ray.hang_timeout` hangs, whether its process is stopped (then it doesn't answer) or its training waits for ever (then it
answers with the sign that is known). Since all wait for the one that hangs, the one that is furthest behind is taken for
it. It is killed: to Ray Train that is a worker that failed, which it restarts or not.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pipeline.display import clock_time
from pipeline.training.pulse import Sign, ask_to_stop, last_sign

__all__ = ["Watch"]

ASK_EVERY_S = 5.0


@dataclass
class _Worker:
    actor: Any
    node: str
    pid: int
    sign: Sign = field(default_factory=Sign)
    seen: float = field(default_factory=time.time)
    """When a new sign was seen last."""
    reported: int = 0
    """The last step that all workers have reported."""
    asked: Any = None
    """The question that is not answered yet."""


class Watch:
    """The workers of the attempt at hand.

    Args:
        timeout_s: `ray.hang_timeout`.

    Attributes:
        hung: what is known of the workers that were killed for hanging, by rank; empty again with the next attempt.
    """

    def __init__(self, timeout_s: float) -> None:
        self.hung: dict[int, str] = {}
        self._timeout_s = timeout_s
        self._every_s = min(ASK_EVERY_S, timeout_s / 4)
        self._workers: dict[int, _Worker] = {}
        self._last_asked = 0.0
        self._stopping = False

    def add(self, rank: int, actor: Any, node: str, pid: int) -> None:
        """A worker has started."""
        if not self._workers:
            self.hung = {}
        self._workers[rank] = _Worker(actor, node, pid)
        if self._stopping:
            actor.execute.remote(ask_to_stop)

    def leave(self) -> None:
        """The attempt has ended."""
        self._workers = {}

    def node(self, rank: int) -> str | None:
        """The node that a worker is on, where it is known."""
        known = self._workers.get(rank)
        return known.node if known else None

    @property
    def nodes(self) -> dict[str, list[int]]:
        """Ranks on each node."""
        found: dict[str, list[int]] = {}
        for rank, worker in sorted(self._workers.items()):
            found.setdefault(worker.node, []).append(rank)
        return found

    def name(self, rank: int) -> str:
        """A worker and its node, as messages call it."""
        node = self.node(rank)
        return f"worker {rank} on {node}" if node else f"worker {rank}"

    def hear(self, step: int) -> None:
        """All workers have reported a step, which takes all of them: a sign of life of each."""
        for worker in self._workers.values():
            worker.reported, worker.seen = step, time.time()

    @property
    def step(self) -> int:
        """The last step that any worker is known to have taken in this attempt."""
        return max((worker.sign.step for worker in self._workers.values()), default=0)

    def stop(self) -> bool:
        """Ask the workers to save and stop after the step that runs; False where there is none to ask."""
        self._stopping = True
        for worker in self._workers.values():
            worker.actor.execute.remote(ask_to_stop)
        return bool(self._workers)

    def check(self) -> list[str]:
        """Ask for signs of life, and kill what hangs; returns what happened, a sentence per worker."""
        if self.hung or time.monotonic() - self._last_asked < self._every_s:
            return []
        self._last_asked = time.monotonic()
        for worker in self._workers.values():
            self._ask(worker)
        if not any(self._is_silent(worker) for worker in self._workers.values()):
            return []
        return [self._kill(rank) for rank in self._to_blame()]

    def _ask(self, worker: _Worker) -> None:
        """Take the answer to the last question, if there is one, and ask again."""
        import ray

        if worker.asked is not None and ray.wait([worker.asked], timeout=0)[0]:
            answered, worker.asked = worker.asked, None
            try:
                sign = ray.get(answered)
            except ray.exceptions.RayError:
                return  # it has died; Ray Train will say so
            if sign != worker.sign:
                worker.sign, worker.seen = sign, time.time()
        if worker.asked is None:
            worker.asked = worker.actor.execute.remote(last_sign)

    def _is_silent(self, worker: _Worker) -> bool:
        return not worker.sign.over and time.time() - worker.seen > self._timeout_s

    def _to_blame(self) -> list[int]:
        """Ranks that don't answer; where all do, those that are furthest behind."""
        late = {rank: worker for rank, worker in self._workers.items() if not worker.sign.over and rank not in self.hung}
        mute = [rank for rank, worker in late.items() if self._is_silent(worker) and self._is_mute(worker)]
        least = min((worker.sign.count for worker in late.values()), default=0)
        return mute or [rank for rank, worker in late.items() if worker.sign.count == least and self._is_silent(worker)]

    def _is_mute(self, worker: _Worker) -> bool:
        import ray

        return worker.asked is not None and not ray.wait([worker.asked], timeout=1)[0]

    def _kill(self, rank: int) -> str:
        import ray

        worker = self._workers[rank]
        since, step = clock_time(worker.seen), max(worker.sign.step, worker.reported)
        self.hung[rank] = f"{self.name(rank)} hung: no sign of life since {since}, after step {step}"
        ray.kill(worker.actor)
        return f"{self.hung[rank]} (ray.hang_timeout: {self._timeout_s:g} s); killed"
