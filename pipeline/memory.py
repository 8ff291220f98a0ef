"""What ran out of memory, and how much there was, by what Ray and torch said."""

from __future__ import annotations

import re

__all__ = ["out_of_memory"]

NODE = re.compile(r"Memory on the node \(IP: ([^,)]+)[^)]*\) was ([\d.]+GB) used / ([\d.]+GB) limit")
"""Ray's memory monitor, which kills workers before the system does."""
GPU = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\. GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free"
)
CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def out_of_memory(said: str) -> str | None:
    """The want of memory that an error tells of, in a phrase; None for other errors."""
    if (found := NODE.search(said)) is not None:
        return f"the node {found[1]} ran out of memory: {found[2]} of {found[3]} were used"
    if (found := GPU.search(said)) is not None:
        return f"GPU {found[2]} ran out of memory: {found[1]} more were needed, and {found[4]} of {found[3]} were free"
    if (found := CPU.search(said)) is not None:
        return f"a worker ran out of memory: {int(found[1]) / 1e9:.1f} GB more were needed"
    return None
