"""The end of Ray Train's controller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from cluster.ray_compat import remove_orphaned_groups

__all__ = ["END_WITHIN_S", "end_controller"]

POLL_EVERY_S = 0.1
END_WITHIN_S = 10.0
"""Seconds that a controller has to end its workers."""


def end_controller(find: Callable[[], Any], ended: threading.Event) -> None:
    """Abort Ray's controller, which ends its workers and removes their placement group.

    Args:
        find: returns the controller's actor; None until the starting controller has reported it.
        ended: set when `fit` has returned.
    """
    import ray

    deadline = time.monotonic() + END_WITHIN_S
    while (controller := find()) is None and time.monotonic() < deadline and not ended.wait(POLL_EVERY_S):
        pass
    if controller is None or ended.is_set():
        return
    controller.abort.remote()
    # `abort` is a coroutine of the controller's event loop: a controller that blocks never gets to it.
    if not ended.wait(END_WITHIN_S):
        ray.kill(controller)
        # `fit` returns once the controller is dead.
        if ended.wait(END_WITHIN_S):
            remove_orphaned_groups()
