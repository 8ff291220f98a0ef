"""A channel between actors and the process on their node that watches them; no process stands in between."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Self

from pipeline.errors import UserError

__all__ = ["NodeChannel", "Outbox"]

SIZE_BYTES = 8


class NodeChannel:
    """Sends what actors on this node put to the process that has opened the channel.

    Each sending process appends to a file of its own: what it has put stays in order, and stays when it dies. No sender waits
    for the reader.

    Args:
        folder: of the senders' files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._positions: dict[Path, int] = {}

    def __reduce__(self) -> Any:
        # Without the positions, which are the reader's.
        return type(self), (self.folder,)

    @classmethod
    @contextmanager
    def opened(cls) -> Iterator[Self]:
        """Yield a new channel, whose folder is deleted at the end.

        The folder is in Ray's, which this process and the node's actors share even where they see different temporary folders.
        """
        import ray

        context = ray.get_runtime_context()
        parent = Path(context.get_temp_dir(), context.get_session_name())
        if (owner := parent.stat().st_uid) != os.getuid():
            raise UserError(
                f"ray.address: the cluster's processes on this node are those of user {owner}, and this one is of user "
                f"{os.getuid()}, so that they can't share files; run it as that user, or as a job (`prefray submit`)"
            )
        folder = Path(tempfile.mkdtemp(prefix="prefray-", dir=parent))
        try:
            yield cls(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, item: Any) -> None:
        """Send an object.

        Raises:
            FileNotFoundError: when the channel is closed, or on another node.
            OSError: when the disk is full; nothing is sent then.
        """
        content = pickle.dumps(item)
        data = len(content).to_bytes(SIZE_BYTES) + content
        path = _sent_by(self.folder, os.getpid())
        # Unbuffered: one call of the system, which reports how much it has written.
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            if file.write(data) < len(data):
                # Half an object would hide all that this process sends later.
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def take(self) -> Iterator[Any]:
        """Yield what was sent since the last call; of several processes, first that of the one that began to send first."""
        # Names begin with the time of the first object, in digits of equal number.
        for path in sorted(self.folder.glob("*.sent")):
            with path.open("rb") as file:
                file.seek(self._positions.get(path, 0))
                while (data := _next(file)) is not None:
                    # Before the object is handled: an error there doesn't repeat it.
                    self._positions[path] = file.tell()
                    yield pickle.loads(data)  # noqa: S301 - in a folder that only this user can open


class Outbox:
    """Sends objects to channels, in their order; what a full disk doesn't take is kept for the next time.

    What is sent to a channel that has closed is dropped, since no process reads it.
    """

    def __init__(self) -> None:
        self._unsent: list[tuple[Any, Any]] = []

    def send(self, channel: NodeChannel, item: Any) -> None:
        """Send an object, after those that were kept."""
        self._unsent.append((channel, item))
        self.flush()

    def flush(self) -> None:
        """Send what was kept, as far as the disk takes it."""
        with suppress(OSError):
            while self._unsent:
                channel, item = self._unsent[0]
                with suppress(FileNotFoundError):
                    channel.put(item)
                del self._unsent[0]


@cache
def _sent_by(folder: Path, pid: int) -> Path:
    """Return the file of this process: one, however many copies of a channel it has unpickled."""
    return folder / f"{time.monotonic_ns():020d}-{pid}.sent"


def _next(file: Any) -> bytes | None:
    """Read an object's bytes; None where its sender hasn't written it to the end."""
    size = int.from_bytes(file.read(SIZE_BYTES))
    data: bytes = file.read(size)
    return data if size and len(data) == size else None
