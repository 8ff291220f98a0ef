"""The plan of a run: all decisions before its workers start."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.planning import RunPlan
from pipeline.runs.events import RunEvents
from pipeline.runs.folder import RunFolder
from pipeline.runs.owner import Ownership

if TYPE_CHECKING:
    from pipeline.data import Prepared
    from pipeline.reference import Scores
    from pipeline.tracking.dispatcher import Tracking

__all__ = ["TrainingPlan"]


@dataclass(frozen=True)
class TrainingPlan(RunPlan):
    """A run's plan once its data are prepared: what its workers need, and what is open while they train."""

    folder: RunFolder
    events: RunEvents
    """Recorder of the run's events."""
    prepared: Prepared
    steps: int
    """Optimizer steps of the run."""
    debug: bool
    tracking: Tracking
    """The run's trackers, already started."""
    scores: Scores | None
    """Reference log-probabilities, where they are cached."""
    cancel: threading.Event | None
    """Set by another thread to cancel the run."""
    owner: Ownership
    """Ownership of the run's folder."""
