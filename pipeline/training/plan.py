"""The plan of a run: all decisions before its workers start."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.data.store import TRAIN
from pipeline.inspection.selection import Selection
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
    selection: Selection | None = None
    """Training rows that `select:` keeps; None for all."""

    @property
    def train_rows(self) -> int:
        """Number of rows that the run trains on."""
        return self.prepared.train_rows if self.selection is None else self.selection.rows

    def row_ids(self) -> list[int]:
        """Read the ids of the rows that the run trains on, in the order of the store."""
        ids = self.prepared.read(TRAIN, ["row_id"])["row_id"]
        return (ids if self.selection is None else ids.take(self.selection.indices())).to_pylist()
