"""Memory and GPUs of the machine, or container, that this runs on."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Gpu", "Gpus", "Machine", "find_gpus", "machine_memory", "shared_memory"]

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - looked at, not written to
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """Where the memory is: bytes of a machine, or of each of its GPUs."""

    kind: Literal["CPU", "GPU"]
    total: int
    free: int


@dataclass(frozen=True)
class Gpu:
    """One GPU, as torch sees it."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Gpus:
    """What torch finds."""

    found: tuple[Gpu, ...] = ()
    problem: str | None = None
    """Why it finds none."""
    cuda: str | None = None
    nccl: str | None = None


def machine_memory() -> Machine:
    """Main memory of this machine, or of the container that this is."""
    import psutil

    memory = psutil.virtual_memory()
    limit = min((found for path in LIMITS if (found := _limit(path)) is not None), default=memory.total)
    return Machine("CPU", min(memory.total, limit), min(memory.available, limit))


def shared_memory() -> tuple[int, int] | None:
    """Bytes of /dev/shm, all and free; None where there is none."""
    if not os.path.isdir(SHARED_MEMORY):
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return usage.total, usage.free


def find_gpus() -> Gpus:
    """Look for GPUs; loads torch."""
    import torch

    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if cuda is None else "torch finds no driver for its CUDA"
        return Gpus(problem=why, cuda=cuda)
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free))
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return Gpus(tuple(found), None, cuda, ".".join(str(part) for part in nccl) if nccl else None)


def _limit(path: str) -> int | None:
    """Bytes that a container may have, None where there is no limit."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
