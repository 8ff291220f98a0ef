"""Whose turn it is on a host: noted by its first worker, and read by the driver once workers have died."""

from __future__ import annotations

import os

from cluster.ray_compat import get_value, put_value
from pipeline.ray.channel import NodeChannel

__all__ = ["SEVERAL", "TurnNote"]

SPACE = b"prefray-turns"
SEVERAL = "-" * 32


class TurnNote:
    """A run's name: in a file, where worker and driver are on one node, and else in the memory of the cluster's head.

    Not in the worker itself, with which it would be lost. A turn of a small model takes milliseconds, and a file costs none of
    them.

    Args:
        channel: of the host's driver.
        is_here: whether the driver is on this node.
    """

    def __init__(self, channel: NodeChannel, is_here: bool) -> None:
        self._key, self._path = channel.folder.name, channel.folder / "turn"
        self._is_here = is_here
        self._file: int | None = None

    def write(self, name: str | None) -> None:
        """Note a run's name, None where several compute together; all names have the length of `SEVERAL`."""
        name = name or SEVERAL
        if not self._is_here:
            put_value(self._key, name, SPACE)
            return
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.pwrite(self._file, name.encode(), 0)

    def take(self) -> str | None:
        """Return the name, and forget it; None where no run has had a turn. For the driver."""
        if self._path.exists():
            name = self._path.read_text()
            self._path.unlink()
            return name
        if name := get_value(self._key, SPACE):
            put_value(self._key, None, SPACE)
        return name
