"""Waiting for storage that fails for a while."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa

__all__ = ["STORAGE_ERRORS", "patiently"]

logger = logging.getLogger(__name__)

STORAGE_ERRORS = (OSError, pa.ArrowException, NotImplementedError)
"""What filesystems raise: pyarrow's errors aren't all OSErrors (Azure's), and some stores can't be written at all."""
PATIENCE_S = 300.0
"""How long storage may fail before the run does."""
LONGEST_PAUSE_S = 15.0
HOPELESS = (errno.ENOSPC, errno.EDQUOT)
"""Errors that waiting doesn't mend."""

T = TypeVar("T")


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
