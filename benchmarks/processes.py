"""Processes that torch connects, forked from one that has imported what all of them need."""

from __future__ import annotations

import gc
import multiprocessing
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed
import torch.multiprocessing

__all__ = ["free_port", "spawn"]

PRELOADED = ["strategies.preload", "strategies.trainers.kto"]


def spawn(target: Callable[..., None], number: int, *given: Any) -> None:
    """Run `target(rank, *given)` in so many processes; the error of the first that fails is raised.

    The process group that they join is destroyed at their end.

    Their environment is that of the first call: later changes of this process's don't reach them.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(_run, args=(target, *given), nprocs=number, start_method="forkserver")


def _run(rank: int, target: Callable[..., None], *given: Any) -> None:
    target(rank, *given)
    # A DDP reducer that holds the group last joins gloo's threads with Python's lock held, while they may wait for the lock.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
