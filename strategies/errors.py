"""Errors of code from outside: the message is for whoever wrote it."""

from __future__ import annotations

__all__ = ["OutsideError"]


class OutsideError(ValueError):
    """A plugin, or a function that one has registered, failed; the message names it and the line."""
