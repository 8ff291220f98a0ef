"""The line to one tracker: what it is told goes through a thread, so that a slow or broken one doesn't hold the run up."""

from __future__ import annotations

import queue
import textwrap
import threading
from collections.abc import Callable

from pipeline.config.secrets import redact_text
from pipeline.tracking.run import Tracker

__all__ = ["Line"]

ATTEMPTS = 3
"""For each thing that a tracker is told; libraries try again for themselves too."""
PAUSE_S = 10.0


class Line:
    """Tells one tracker, in order; what it doesn't take after three attempts is counted as lost."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.lost = 0
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._notes: queue.Queue[str] = queue.Queue()
        self._has_failed = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"to {tracker.label}", daemon=True)
        self._thread.start()

    def tell(self, call: Callable[[], None]) -> None:
        """Have it called in its turn."""
        self._calls.put(call)

    def notes(self) -> list[str]:
        """What a person should know of it, since it was last asked."""
        found = []
        while not self._notes.empty():
            found.append(self._notes.get())
        return found

    def close(self, call: Callable[[], None], within_s: float) -> None:
        """Have this called as the last thing, and wait for it."""
        self._calls.put(call)
        self._calls.put(None)
        self._ending.set()
        self._thread.join(timeout=within_s)
        if self._thread.is_alive():
            self._notes.put(f"{self.tracker.label} hasn't taken everything within {within_s:.0f} s; the rest is left out")
        elif self.lost:
            self._notes.put(f"{self.tracker.label} hasn't taken {self.lost} of the things that it was told")

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            if not any(self._try(call) for _ in range(ATTEMPTS)):
                self.lost += 1

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - libraries raise what they like; it is told, and training goes on
            if not self._has_failed:
                why = textwrap.shorten(redact_text(f"{type(error).__name__}: {error}"), 300, placeholder=" ...")
                self._notes.put(f"{self.tracker.label} has failed, training goes on: {why}")
            self._has_failed = True
            self._ending.wait(PAUSE_S)
            return False
        return True
