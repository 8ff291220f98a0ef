"""Between a sweep's driver and its trials: trials say how they stand, the driver says which runs are over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Mailbox", "open_mailbox"]


class Mailbox:
    """An actor's state.

    Tune can end a trial only when it has answered, which it does at evaluations; a run that is over frees its workers at once.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._over: set[str] = set()

    def put(self, event: dict[str, Any]) -> None:
        """A trial says something."""
        self._events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """What trials have said since the last call."""
        events, self._events = self._events, []
        return events

    def end(self, run: str) -> None:
        """A run is to end."""
        self._over.add(run)

    def is_over(self, run: str) -> bool:
        """Whether a run is to end."""
        return run in self._over


@contextmanager
def open_mailbox() -> Iterator[Any]:
    """A handle of a new actor on the driver's node; Tune keeps it among its parameters, so the actor is ended here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    try:
        yield mailbox
    finally:
        ray.kill(mailbox)
