"""What a worker's process says of itself when it is asked from outside, and what it can be told.

Both go past the training thread, through the actor that Ray Train runs it in: a process that is stopped, or lost, doesn't
answer, and one whose training hangs answers with the same count of signs of life.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Sign", "ask_to_stop", "attach", "beat", "last_sign"]


@dataclass(frozen=True)
class Sign:
    """A sign of life: the `count`th of this worker, after so many optimizer steps."""

    count: int = 0
    step: int = 0
    over: bool = False
    """Whether the worker has nothing more to do."""


class _Process:
    """This process; a worker has one of its own."""

    sign = Sign()
    trainer: Any = None
    stop_requested = False


def beat(step: int | None = None, over: bool = False) -> None:
    """Give a sign of life."""
    old = _Process.sign
    _Process.sign = Sign(old.count + 1, old.step if step is None else step, over)


def last_sign() -> Sign:
    """The last sign of life; other processes call it through the actor."""
    return _Process.sign


def ask_to_stop() -> None:
    """Save and stop after the step that runs; before the first one, after it. Other processes call it through the actor."""
    _Process.stop_requested = True
    if _Process.trainer is not None:
        _Process.trainer.request_stop()


def attach(trainer: Any) -> None:
    """Let requests to stop reach this trainer."""
    _Process.trainer = trainer
    if _Process.stop_requested:
        trainer.request_stop()
