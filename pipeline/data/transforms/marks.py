"""Marks of pictures: what stands for them in strings while a row is rendered and checked."""

from __future__ import annotations

import re

__all__ = ["MARK", "MARK_END", "MARK_START", "mark", "without_marks"]

MARK_START, MARK_END = "\ue003", "\ue004"
"""Characters for private use, as those of `skeletons.py` and `dates.py`, and others than theirs."""
MARK = re.compile(f"{MARK_START}(\\d+){MARK_END}")
"""A picture's number in its row."""


def mark(number: int) -> str:
    """Return the mark of a row's picture, by its number from 0."""
    return f"{MARK_START}{number}{MARK_END}"


def without_marks(text: str) -> str:
    """Return a text for readers, with `[picture]` instead of each mark."""
    return MARK.sub("[picture]", text)
