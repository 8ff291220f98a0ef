"""The channel between a sweep's driver and its trials, and the events that it carries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.ray.channel import NodeChannel
from pipeline.tuning.cost import RunCost

__all__ = ["SweepChannel", "TrialBegan", "TrialEvent", "TrialFault", "TrialNote", "TrialPlaced", "TrialProgress"]


@dataclass(frozen=True)
class TrialEvent:
    """What a run of a trial reports to the driver; a trial that is retried has several runs."""

    trial: int
    """The trial's number."""
    run: str
    """Id of the run."""


@dataclass(frozen=True)
class TrialBegan(TrialEvent):
    """A run has a folder, and begins."""

    folder: str
    values: dict[str, Any] | None
    """The searched keys' values; None for the recipe's own."""
    origin: str | None
    """Trial and step that it was forked from."""


@dataclass(frozen=True)
class TrialPlaced(TrialEvent):
    """A run has a slot of a host, or gets workers of its own while other trials share some."""

    host: int | None
    """Number of the host."""
    why: str = ""
    """Why it has workers of its own."""


@dataclass(frozen=True)
class TrialProgress(TrialEvent):
    """State after the last logged step."""

    step: int
    total_steps: int
    tokens: int
    metrics: dict[str, float]
    """Those of the last evaluation."""
    cost: RunCost
    """Of a run that has finished; unknown before."""


@dataclass(frozen=True)
class TrialNote(TrialEvent):
    """A note for the user."""

    text: str


@dataclass(frozen=True)
class TrialFault(TrialEvent):
    """The run has failed."""

    reason: str


class SweepChannel(NodeChannel):
    """Carries the events of trials, which run on the driver's node, and the other way whose runs are over.

    Tune can stop a trial only when `step` returns, which it does at evaluations. A run that polls `is_over` frees its
    workers at once.
    """

    def end(self, run: str) -> None:
        """Mark a run to be cancelled."""
        # A file, since a `NodeChannel` carries objects in one direction only.
        self._mark(run).touch()

    def is_over(self, run: str) -> bool:
        """Return whether a run is to be cancelled."""
        return self._mark(run).exists()

    def _mark(self, run: str) -> Path:
        return self.folder / f"{run}.over"
