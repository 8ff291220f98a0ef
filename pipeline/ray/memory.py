"""Explanations of errors of Ray and torch that mean running out of memory."""

from __future__ import annotations

import re

__all__ = ["out_of_memory"]

NODE = re.compile(r"Memory on the node \(IP: ([^,)]+)[^)]*\) was ([\d.]+GB) used / ([\d.]+GB) limit")
"""Of Ray's memory monitor, which kills workers before the system does."""
GPU = re.compile(
    r"Tried to allocate ([\d.]+ \w+)\. GPU (\d+) has a total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free"
)
CPU = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


def out_of_memory(message: str) -> str | None:
    """Explain an error message of running out of memory, in a phrase; return None for other errors."""
    if (match := NODE.search(message)) is not None:
        return f"the node {match[1]} ran out of memory: {match[2]} of {match[3]} were used"
    if (match := GPU.search(message)) is not None:
        return f"GPU {match[2]} ran out of memory: {match[1]} more were needed, and {match[4]} of {match[3]} were free"
    if (match := CPU.search(message)) is not None:
        return f"a worker ran out of memory: {int(match[1]) / 1e9:.1f} GB more were needed"
    return None
