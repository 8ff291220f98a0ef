"""Waiting: for storage that fails for a while, and for whatever else blocks a command."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

__all__ = ["STORAGE_ERRORS", "patiently", "waiting_for", "waits"]

logger = logging.getLogger(__name__)

STORAGE_ERRORS = (OSError, pa.ArrowException, NotImplementedError)
"""What filesystems raise: pyarrow's errors aren't all OSErrors (Azure's), and some stores can't be written at all."""
PATIENCE_S = 300.0
"""How long storage may fail before the run does."""
LONGEST_PAUSE_S = 15.0
HOPELESS = (errno.ENOSPC, errno.EDQUOT)
"""Errors that waiting doesn't mend."""

T = TypeVar("T")

waits: list[str] = []
"""What is waited for in this process, the innermost last."""


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Around a call that may block.

    Args:
        what: the thing, in words that follow "waiting for".
    """
    waits.append(what)
    try:
        yield
    finally:
        waits.remove(what)


def patiently(work: Callable[[], T], what: str, meanwhile: Callable[[], None] = lambda: None) -> T:
    """Do it again while storage fails, at growing intervals.

    Args:
        work: what storage is asked for.
        what: that, in words, for the log.
        meanwhile: called at every attempt: a worker's sign of life.

    Raises:
        OSError: when it has failed for `PATIENCE_S`, or is full; pyarrow.ArrowException: the same, from stores that raise it.
    """
    deadline, pause = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return work()
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None) in HOPELESS or time.monotonic() + pause > deadline:
                raise
            logger.warning("%s failed and is tried again in %.1f s: %s", what, pause, error)
        meanwhile()
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
