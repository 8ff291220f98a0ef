"""Processes that torch connects, forked from one that has imported what all of them need."""

from __future__ import annotations

import multiprocessing
import socket
from typing import Any

import torch.multiprocessing

__all__ = ["free_port", "spawn"]

PRELOADED = ["strategies.preload", "strategies.trainers.kto"]


def spawn(target: Any, number: int, *given: Any) -> None:
    """Run `target(rank, *given)` in so many processes; the error of the first that fails is raised.

    Their environment is that of the first call: later changes of this process's don't reach them.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(target, args=given, nprocs=number, start_method="forkserver")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
