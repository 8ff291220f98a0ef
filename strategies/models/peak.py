"""Peak of a device: operations per second of a plain matrix product, measured once and kept on the node."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

__all__ = ["CACHE", "measure_peak", "peak_of"]

CACHE = Path("~/.cache/prefray/peaks.json")
SIZES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the product: large enough that a larger one isn't faster, small enough to take milliseconds."""
REPEATS, ENOUGH_S = 5, 0.3
"""Most products that are timed, and the seconds after which no further one is."""


def peak_of(device: torch.device, dtype: torch.dtype, cache: Path = CACHE) -> float:
    """Return the operations per second of a matrix product of `dtype`, of this process's threads on a CPU.

    The first call on a node measures it, in about 0.3 s; later ones read `cache`. A cache that can't be read or written is
    ignored.
    """
    file, key = cache.expanduser(), _key(device, dtype)
    known = _read(file)
    if key not in known:
        known = {**known, key: measure_peak(device, dtype)}
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            # Replaced as a whole: other ranks of the node write the same file.
            partial = file.with_name(f"{file.name}.{os.getpid()}")
            partial.write_text(json.dumps(known, indent=2))
            os.replace(partial, file)
    return known[key]


def measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the operations per second of the fastest of some matrix products of `dtype`."""
    size = SIZES.get(device.type, SIZES["cuda"])
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right  # loads kernels
    seconds = [_seconds(left, right)]
    while len(seconds) < REPEATS and sum(seconds) < ENOUGH_S:
        seconds.append(_seconds(left, right))
    return 2.0 * size**3 / min(seconds)


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    on_gpu = left.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(left.device)
    start = time.perf_counter()
    left @ right
    if on_gpu:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - start


def _key(device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cuda":
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        where = torch.cuda.get_device_name(device) + " with TF32" * tf32
    else:
        where = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{where}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
