"""Memory and GPUs of this machine or container."""

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
    """Bytes of memory of a machine, or of each of its GPUs."""

    kind: Literal["CPU", "GPU"]
    total: int
    free: int


@dataclass(frozen=True)
class Gpu:
    """One GPU, as torch sees it; its memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True)
class Gpus:
    """The GPUs that torch finds."""

    found: tuple[Gpu, ...] = ()
    problem: str | None = None
    """Why there are none."""
    cuda: str | None = None
    nccl: str | None = None


def machine_memory() -> Machine:
    """Return the main memory of this machine or container."""
    import psutil

    memory = psutil.virtual_memory()
    # cgroup v1 writes a number beyond any memory for "no limit", so the machine's total bounds it.
    limit = min((found for path in LIMITS if (found := _limit(path)) is not None), default=memory.total)
    return Machine("CPU", min(memory.total, limit), min(memory.available, limit))


def shared_memory() -> tuple[int, int] | None:
    """Return total and free bytes of /dev/shm; None without one."""
    if not os.path.isdir(SHARED_MEMORY):
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return usage.total, usage.free


def find_gpus() -> Gpus:
    """Find GPUs with torch, which is imported here."""
    import torch

    cuda = torch.version.cuda
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if cuda is None else "torch finds no driver for its CUDA"
        return Gpus(problem=why, cuda=cuda)
    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    # Built without NCCL, torch raises at the version.
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    return Gpus(tuple(gpus), None, cuda, ".".join(str(part) for part in nccl) if nccl else None)


def _limit(path: str) -> int | None:
    """Read a container's memory limit in bytes; None without one."""
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    # cgroup v2 writes "max" for no limit.
    return int(text) if text.isdigit() else None
