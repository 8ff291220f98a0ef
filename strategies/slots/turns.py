"""One thread a slot, of which one runs at a time: from when it is given a turn until it passes it back."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import Any

import torch

from strategies.slots.process_state import ProcessState

__all__ = ["SlotClosed", "TurnThread"]


class SlotClosed(Exception):
    """Raised in a slot that gets no further turn."""


class TurnThread:
    """Runs a function in a thread of its own, in turns. Between them the process has the state that it had before.

    Args:
        function: called in the first turn; it ends turns by `pass_back`.
        name: of the thread.

    Attributes:
        result: what the function returns or raises.
        is_over: whether it has ended.
    """

    def __init__(self, function: Callable[[], Any], name: str) -> None:
        self.is_over = False
        self._given, self._passed = Semaphore(0), Semaphore(0)
        self._closed = False
        self._state: ProcessState | None = None
        # torch has a number of threads per thread.
        self._threads = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self.result: Future[Any] = self._executor.submit(self._run, function)

    def give(self) -> None:
        """Give a turn, and wait until it is passed back or the function has ended."""
        outside = ProcessState.current()
        if self._state is not None:
            self._state.put()
        self._given.release()
        self._passed.acquire()
        self._state = ProcessState.current()
        outside.put()
        if self.is_over:
            self._state = None
            self._executor.shutdown()

    def pass_back(self) -> None:
        """End the current turn, and wait for the next one; for the function alone.

        Raises:
            SlotClosed: if there will be none.
        """
        self._passed.release()
        self._wait()

    def close(self) -> None:
        """Raise `SlotClosed` in the function where it waits for its next turn, and wait for its end."""
        self._closed = True
        while not self.is_over:
            self.give()

    def _run(self, function: Callable[[], Any]) -> Any:
        try:
            self._wait()
            torch.set_num_threads(self._threads)
            return function()
        finally:
            self.is_over = True
            self._passed.release()

    def _wait(self) -> None:
        self._given.acquire()
        if self._closed:
            raise SlotClosed
