"""Retries of storage operations, and a register of what a command waits for."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pyarrow as pa

__all__ = ["STORAGE_ERRORS", "with_retries", "waiting_for", "waits"]

logger = logging.getLogger(__name__)

STORAGE_ERRORS = (OSError, pa.ArrowException, NotImplementedError)
"""Errors of filesystems: not all of pyarrow's are OSErrors (Azure's), and some stores can't be written at all."""
RETRY_TIMEOUT_S = 300.0
"""Seconds that storage may fail before the run does."""
MAX_BACKOFF_S = 15.0
NOT_RETRIED = (errno.ENOSPC, errno.EDQUOT)
"""Errors that retries don't help against."""

T = TypeVar("T")

waits: list[str] = []
"""What this process waits for, innermost last."""


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Register a call that may block, while the context is open.

    Args:
        what: the rest of a sentence that begins with "waiting for".
    """
    waits.append(what)
    try:
        yield
    finally:
        waits.remove(what)


def with_retries(work: Callable[[], T], what: str, meanwhile: Callable[[], None] = lambda: None) -> T:
    """Call `work`, with retries and exponential backoff while storage fails; return its result.

    Args:
        work: the storage operation.
        what: its description, for the log.
        meanwhile: called at every retry, such as a worker's heartbeat.

    Raises:
        OSError: when storage has failed for `RETRY_TIMEOUT_S`, or is full; some stores raise pyarrow.ArrowException instead.
    """
    deadline, backoff = time.monotonic() + RETRY_TIMEOUT_S, 0.5
    while True:
        try:
            return work()
        # Not NotImplementedError, of `STORAGE_ERRORS`: a store that can't be written at all doesn't recover.
        except (OSError, pa.ArrowException) as error:
            # ArrowExceptions have no errno, and OSErrors of object stores an empty one.
            if getattr(error, "errno", None) in NOT_RETRIED or time.monotonic() + backoff > deadline:
                raise
            logger.warning("%s failed and is tried again in %.1f s: %s", what, backoff, error)
        meanwhile()
        time.sleep(backoff)
        backoff = min(2 * backoff, MAX_BACKOFF_S)
