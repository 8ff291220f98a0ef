"""The first answer of a store whose client may wait for minutes: given up soon, since a user waits for a command to start."""

from __future__ import annotations

import threading
from contextlib import suppress

from pyarrow import fs

__all__ = ["check_answer"]

ANSWER_S = 25.0
"""Seconds that a store may take."""
_ANSWERED: set[str] = set()
"""Stores that have answered this process."""


def check_answer(location: str, filesystem: fs.FileSystem, path: str) -> None:
    """Make sure that a store answers when this process asks it for the first time, whatever the answer is.

    S3 isn't asked: its requests end by themselves, and Python's exit would wait for one that doesn't.

    Args:
        location: URI of what is asked for.
        filesystem, path: where it is, by `pipeline.io.filesystems.resolve`.

    Raises:
        TimeoutError: when it doesn't answer.
    """
    if isinstance(filesystem, fs.LocalFileSystem | fs.S3FileSystem):
        return
    address, _, options = location.partition("?")
    store = "/".join([*address.split("/")[:3], options])
    if store in _ANSWERED:
        return

    def ask() -> None:
        # What it raises is raised again by the request that follows.
        with suppress(Exception):
            filesystem.get_file_info(path)

    thread = threading.Thread(target=ask, name="first answer", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if thread.is_alive():
        raise TimeoutError(f"it doesn't answer in time: nothing for {ANSWER_S:g} seconds")
    _ANSWERED.add(store)
