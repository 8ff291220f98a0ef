"""SIGTERM, as schedulers send it before they take a machine away: the run saves, then ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

__all__ = ["RunControl", "StopSignal"]


class RunControl:
    """Lets another thread end a run, which then saves nothing more.

    Args:
        workers_started: is told the placement group of the workers of each attempt, by each of them: it outlives a driver that
            dies.
    """

    def __init__(self, workers_started: Callable[[Any], None]) -> None:
        self.workers_started = workers_started
        self._event = threading.Event()

    def cancel(self) -> None:
        """End the run."""
        self._event.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the run is to end."""
        return self._event.is_set()


class StopSignal:
    """While the context is open, the first SIGTERM is only noted, and a second one raises KeyboardInterrupt.

    Signals reach the main thread alone; elsewhere nothing is changed.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
