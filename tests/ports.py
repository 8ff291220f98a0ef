"""Ports of this machine."""

from __future__ import annotations

import socket
from contextlib import closing

__all__ = ["unused_port"]


def unused_port() -> int:
    """One that nobody listens at."""
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
