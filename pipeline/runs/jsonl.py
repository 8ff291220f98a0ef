"""Append-only text files: appended to on local filesystems, rewritten on object stores, which can't append."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.io.retry import with_retries
from pipeline.io.storage import Folder, Location

__all__ = ["AppendOnlyFile", "open_append_only"]

REWRITE_INTERVAL_S = 5.0
SHARE_OF_TIME = 0.05
"""Fraction of the time that may be spent rewriting a file: a long one is written less often."""


class AppendOnlyFile(Protocol):
    """A text file to append to."""

    def read(self) -> str:
        """Read the whole text; empty where there is no file."""

    def add(self, text: str) -> None:
        """Append `text`; after an OSError the file is unchanged."""

    def replace(self, text: str) -> None:
        """Replace the whole text, atomically."""

    def min_interval(self, took_s: float) -> float:
        """Return the seconds to wait before the next write, after one that took `took_s`."""


def open_append_only(location: Location) -> AppendOnlyFile:
    """Open the file at a path or URI, which may not exist yet."""
    return LocalFile(location) if isinstance(location, Path) else StoredFile(location)


class LocalFile:
    """A file on a local or mounted filesystem."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> str:
        return self._path.read_text(encoding="utf-8") if self._path.exists() else ""

    def add(self, text: str) -> None:
        # To restore the file after a part of the text was written.
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError:
            if self._path.exists():  # a full disk may have taken a part of the text
                os.truncate(self._path, size)
            raise

    def replace(self, text: str) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self._path)

    def min_interval(self, took_s: float) -> float:
        return 0.0


class StoredFile:
    """A file at a URI. Only this process writes it, so its text is read once."""

    def __init__(self, location: str) -> None:
        # The query holds options of the store, such as its endpoint, and belongs to the folder's URI as well.
        base, mark, query = location.partition("?")
        folder, _, self._name = base.rpartition("/")
        self._folder = Folder(f"{folder}{mark}{query}")
        self._text: str | None = None

    def read(self) -> str:
        if self._text is None:
            self._text = with_retries(partial(self._folder.read, self._name), f"reading {self._name}") or ""
        return self._text

    def add(self, text: str) -> None:
        if text:
            self.replace(self.read() + text)

    def replace(self, text: str) -> None:
        self._folder.write(self._name, text)
        self._text = text

    def min_interval(self, took_s: float) -> float:
        return max(REWRITE_INTERVAL_S, took_s / SHARE_OF_TIME)
