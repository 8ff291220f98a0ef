"""SIGTERM, which schedulers send before they take a machine away: the run saves, then ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["SigtermHandler"]


class SigtermHandler:
    """While the context is open, the first SIGTERM only sets `received`, and a second one raises KeyboardInterrupt.

    Only the main thread can handle signals; in others this does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> SigtermHandler:
        # Elsewhere `signal.signal` raises ValueError; trials of a sweep train in a thread.
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
