"""One greenlet a slot: its function runs when it is given a turn, until it passes it back.

Not threads: each would hold memory of its own for products and allocations, of 40 MB for a model of 135 million weights, and
Ray's context is that of the thread that Ray has started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenlet import GreenletExit, greenlet

from strategies.slots.process_state import ProcessState

__all__ = ["TurnTaker"]


class TurnTaker:
    """Runs a function in turns. Between them the process has the state that it had before.

    Args:
        function: begins in the first turn, and ends turns by `pass_back`.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._greenlet = greenlet(function)
        self._state: ProcessState | None = None

    @property
    def is_over(self) -> bool:
        """Whether the function has ended."""
        return bool(self._greenlet.dead)

    def give(self) -> Any:
        """Give a turn; return or raise what the function does if it ends in it, None if it continues.

        Every turn must be given by the thread that has created this object.
        """
        return self._switch(self._greenlet.switch)

    def pass_back(self) -> None:
        """End the current turn, and return in the next one; for the function alone.

        Raises:
            GreenletExit: if there will be none.
        """
        self._greenlet.parent.switch()

    def close(self) -> None:
        """Raise `GreenletExit` in the function where it waits for its next turn, until it has ended."""
        while not self.is_over:
            self._switch(lambda: self._greenlet.throw(GreenletExit))

    def _switch(self, switch: Callable[[], Any]) -> Any:
        outside = ProcessState.current()
        if self._state is not None:
            self._state.put()
        try:
            return switch()
        finally:
            self._state = None if self.is_over else ProcessState.current()
            outside.put()
