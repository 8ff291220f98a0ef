"""Observers of a run."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

__all__ = ["StepTimer"]


class StepTimer(TrainerCallback):
    """Adds up the seconds spent in training steps, so that throughput doesn't count evaluation and saving."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def take(self) -> float:
        """Return the seconds since the last call, and start again at 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
