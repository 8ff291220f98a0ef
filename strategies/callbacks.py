"""Observers of a run."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from strategies.errors import OutsideError
from strategies.registering import CALLBACKS, described

__all__ = ["StepTimer", "registered_callbacks"]


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


def registered_callbacks(cfg: Any) -> list[TrainerCallback]:
    """The callbacks that plugins have registered, as this run wants them.

    Raises:
        OutsideError: for a function that fails, or returns something else.
    """
    found = []
    for name, make in CALLBACKS.items():
        try:
            callback = make() if isinstance(make, type) else make(cfg)
        except Exception as error:
            raise OutsideError(described(f"callback {name!r}", make, error)) from error
        if callback is not None and not isinstance(callback, TrainerCallback):
            raise OutsideError(f"callback {name!r}: must be a TrainerCallback or None, got {type(callback).__name__}")
        found += [] if callback is None else [callback]
    return found
