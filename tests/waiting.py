"""Waiting for a condition."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["WAIT_S", "wait_for"]

WAIT_S = 400
T = TypeVar("T")


def wait_for(condition: Callable[[], T]) -> T:
    """What `condition` returns once that is true; looked at twenty times a second, for minutes on a busy machine."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")
