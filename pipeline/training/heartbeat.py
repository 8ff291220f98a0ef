"""A worker's heartbeat, readable by the driver, and the driver's request to stop.

Both bypass the training thread, through the actor that runs it: a process that is stopped or lost doesn't answer, and one whose
training hangs answers with the same heartbeat.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.io.retry import waits

__all__ = ["Heartbeat", "ask_to_stop", "attach", "beat", "last_heartbeat"]


@dataclass(frozen=True)
class Heartbeat:
    """The `count`th heartbeat of a worker, after `step` optimizer steps."""

    count: int = 0
    step: int = 0
    over: bool = False
    """Whether the worker has finished."""
    waiting: str | None = field(default=None, compare=False)
    """What it waits for, as `pipeline.io.retry.waits` says; no sign of life."""


class _Process:
    """State of this process, which runs one worker."""

    heartbeat = Heartbeat()
    trainer: Any = None
    stop_requested = False


def beat(step: int | None = None, over: bool = False) -> None:
    """Record a heartbeat."""
    old = _Process.heartbeat
    _Process.heartbeat = Heartbeat(old.count + 1, old.step if step is None else step, over)


def last_heartbeat() -> Heartbeat:
    """Return the last heartbeat; called from other processes through the actor."""
    # Read in another thread than that which waits, and may end meanwhile.
    return replace(_Process.heartbeat, waiting=next(reversed(waits), None))


def ask_to_stop() -> None:
    """Request the trainer to save and stop after the current or first step; called from other processes through the actor."""
    _Process.stop_requested = True
    # Ray runs the training function in another thread than this call, so the order of this and `attach` is open.
    if _Process.trainer is not None:
        _Process.trainer.request_stop()


def attach(trainer: Any) -> None:
    """Register the trainer to which requests to stop are passed."""
    _Process.trainer = trainer
    # Requested while the model was loading.
    if _Process.stop_requested:
        trainer.request_stop()
