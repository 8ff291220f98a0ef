"""Patches of Ray 2.60; `tests/cluster/test_ray_patches.py` says when one is no longer needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

__all__ = ["lean_node"]

WORKER_SETUP = Path(__file__).with_name("worker_setup.py")


@contextmanager
def lean_node(log_monitor: bool) -> Iterator[None]:
    """Let a Ray that is started here begin its workers without importing Ray twice in each.

    Ray's own program that stands between the raylet and a worker with a runtime environment imports Ray, and becomes the worker
    then, which does so again. `ray.init` has no argument for it, nor for the log monitor.

    Args:
        log_monitor: whether what workers print comes to the driver; if not, a process that reads their files is left out.
    """
    from ray._private.parameter import RayParams

    original = RayParams.__init__

    @wraps(original)
    def with_defaults(self: Any, *arguments: Any, **options: Any) -> None:
        own = {"setup_worker_path": str(WORKER_SETUP), "include_log_monitor": log_monitor}
        original(self, *arguments, **{**own, **options})

    RayParams.__init__ = with_defaults
    try:
        yield
    finally:
        RayParams.__init__ = original
