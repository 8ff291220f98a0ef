"""Commands to a host's first worker, which its driver sends through the actor that runs the worker."""

from __future__ import annotations

import queue
from typing import Any

__all__ = ["receive", "received"]

_COMMANDS: queue.SimpleQueue[Any] = queue.SimpleQueue()


def receive(command: Any) -> None:
    """Take a command; called from the driver through the actor, in another thread than the host's."""
    _COMMANDS.put(command)


def received(patience_s: float) -> list[Any]:
    """Return the commands since the last call, in order.

    Args:
        patience_s: seconds to wait for the first one.
    """
    commands = []
    try:
        commands.append(_COMMANDS.get(timeout=patience_s) if patience_s > 0 else _COMMANDS.get_nowait())
        while True:
            commands.append(_COMMANDS.get_nowait())
    except queue.Empty:
        return commands
