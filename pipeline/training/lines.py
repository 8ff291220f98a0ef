"""A file of lines that grows: appended to on a disk, written anew on object stores, which can't append."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.patience import patiently
from pipeline.storage import Folder, Location

__all__ = ["Lines", "open_lines"]

REWRITE_INTERVAL_S = 5.0
SHARE_OF_TIME = 0.05
"""How much of the time may go into writing a file anew: a long one is written less often."""


class Lines(Protocol):
    """The text of a file."""

    def read(self) -> str:
        """All of it; empty where there is no file."""

    def add(self, text: str) -> None:
        """Write `text` at its end; when that raises OSError, the file is as it was."""

    def replace(self, text: str) -> None:
        """Write `text` in its place, in one move."""

    def pause(self, took_s: float) -> float:
        """Seconds to collect lines for, after a write that took `took_s`."""


def open_lines(where: Location) -> Lines:
    """The file at a path or URI; it may not exist yet."""
    return LocalLines(where) if isinstance(where, Path) else StoredLines(where)


class LocalLines:
    """A file on a disk, or on what is mounted like one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str:
        return self._path.read_text(encoding="utf-8") if self._path.exists() else ""

    def add(self, text: str) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if self._path.exists():
                os.truncate(self._path, size)
            raise

    def replace(self, text: str) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self._path)

    def pause(self, took_s: float) -> float:
        return 0.0


class StoredLines:
    """A file at a URI; one process writes it, so what it holds need not be read again."""

    def __init__(self, where: str) -> None:
        base, mark, query = where.partition("?")
        folder, _, self._name = base.rpartition("/")
        self._folder = Folder(f"{folder}{mark}{query}")
        self._text: str | None = None

    def read(self) -> str:
        if self._text is None:
            self._text = patiently(partial(self._folder.read, self._name), f"reading {self._name}") or ""
        return self._text

    def add(self, text: str) -> None:
        if text:
            self.replace(self.read() + text)

    def replace(self, text: str) -> None:
        self._folder.write(self._name, text)
        self._text = text

    def pause(self, took_s: float) -> float:
        return max(REWRITE_INTERVAL_S, took_s / SHARE_OF_TIME)
