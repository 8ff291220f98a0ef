"""Locks on files of a node's own disk: the kernel's, which end with their process, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["lock", "locked"]

POLL_S = 0.1


@contextmanager
def locked(file: Path, mode: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a lock on `file` while the context is open; arguments and errors as those of `lock`."""
    descriptor = lock(file, mode)
    try:
        yield
    finally:
        os.close(descriptor)


def lock(file: Path, mode: int, beat: Callable[[], None] | None = None) -> int:
    """Return a descriptor with a lock on `file`, which ends when it is closed.

    Args:
        file: created if missing.
        mode: of `flock`; with `LOCK_NB` it raises BlockingIOError where another process holds the lock.
        beat: called again and again while this waits.
    """
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _wait(descriptor, mode, beat)
            # Who evicts an entry deletes its locks: a lock on a deleted file excludes no process.
            if _same(descriptor, file):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _wait(descriptor: int, mode: int, beat: Callable[[], None] | None) -> None:
    if beat is None:
        fcntl.flock(descriptor, mode)
        return
    while True:
        try:
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            beat()
            time.sleep(POLL_S)


def _same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
