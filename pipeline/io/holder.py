"""Processes that hold leases: how they are described, and whether they are alive."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

__all__ = ["VALIDITY_S", "Holder", "here", "machine", "parse"]

VALIDITY_S = 60.0
"""Seconds without a renewal after which a lease may be taken over."""
SAME_START_S = 2.0
"""Tolerance when start times of a process are compared: the clock may have been adjusted."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease. What another version of prefray did not write has its default."""

    id: str
    """Of this lease, not of the process."""
    process: int = 0
    started: float = 0.0
    """Start of the process, by its machine's clock: distinguishes it from later ones of the same number."""
    host: str = "another machine"
    machine: str = ""
    """Boot and pid namespace, within which the process's number means something."""
    since: float = 0.0
    """When it took the lease, by its machine's clock: to be shown, never compared."""
    validity: float = VALIDITY_S

    def __str__(self) -> str:
        return f"process {self.process or 'unknown'} on {self.host}"

    def record(self, beat: int) -> str:
        """Return its record, which `parse` reads; `beat` counts renewals."""
        return json.dumps({**asdict(self), "beat": beat})

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, and of this container."""
        return self.machine == machine()

    def has_ended(self) -> bool:
        """Return whether this machine knows that the process is dead; another process's may be unknown."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.process)
            # A pid may be another process's by now.
            is_it = abs(process.create_time() - self.started) < SAME_START_S
            # A killed process stays as a zombie until its parent has waited for it.
            return not is_it or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            # /proc may hide processes of other users.
            return not psutil.pid_exists(self.process)


def here() -> Holder:
    """Describe this process as the holder of a new lease."""
    started = psutil.Process().create_time()
    return Holder(uuid4().hex, os.getpid(), started, socket.gethostname(), machine(), time.time(), VALIDITY_S)


def machine() -> str:
    """Return an id of this machine's boot, and of the container's pid namespace."""
    with suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return f"{socket.gethostname()} {psutil.boot_time()}"


def parse(text: str) -> Holder | None:
    """Read a record of any version of prefray; None for what is none, such as a truncated one."""
    try:
        record: Any = json.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        return None
    known = {field.name: field.default for field in fields(Holder) if field.name != "id"}
    return Holder(record["id"], **{name: _of_type(record.get(name), default) for name, default in known.items()})


def _of_type(value: Any, default: Any) -> Any:
    kind = (int, float) if isinstance(default, float) else type(default)
    return value if isinstance(value, kind) else default
