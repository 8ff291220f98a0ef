"""Commands to a host. Loads without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Attach", "Close", "Command", "Stop", "TakeTurns"]


@dataclass(frozen=True)
class Attach:
    """Begin a trial in a free slot."""

    name: str
    """Its own among the trials that run."""
    payload: Any = None
    """What `run_trial` needs to know of it; picklable."""


@dataclass(frozen=True)
class Stop:
    """Let a trial save a checkpoint after its current step and stop; nothing if it has ended already."""

    name: str


@dataclass(frozen=True)
class TakeTurns:
    """Run rows of one slot at a time from now on, so that what fails has a name."""


@dataclass(frozen=True)
class Close:
    """End the host as soon as no trial is left."""


Command = Attach | Stop | TakeTurns | Close
