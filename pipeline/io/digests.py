"""Digests of files, and checks against manifests. Each unchanged file is read once per process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["as_written", "damage", "file_digest", "once"]

_KNOWN: dict[tuple[str, str, int, int], str] = {}
"""(what, path, size, mtime in ns) -> digest: weights are gigabytes, and a sweep asks for them once per trial."""


def once(what: str, path: Path, compute: Callable[[], str]) -> str:
    """Return a file's digest of the kind `what`, cached by size and time of modification. Raises OSError."""
    status = path.stat()
    key = what, str(path.resolve()), status.st_size, status.st_mtime_ns
    if key not in _KNOWN:
        _KNOWN[key] = compute()
    return _KNOWN[key]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex. Raises OSError."""

    def read() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return once("bytes", path, read)


def as_written(path: Path) -> dict[str, Any]:
    """Return a manifest's fields for a file: `bytes` and `sha256`. Raises OSError."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def damage(path: Path, entry: dict[str, Any]) -> str | None:
    """Return how a file differs from its manifest, in a phrase; None where it is intact.

    Args:
        entry: fields of `as_written`, and the `file`'s name. Raises KeyError without them.
    """
    if not path.is_file():
        return f"{entry['file']}: is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{entry['file']}: has {size} bytes, {entry['bytes']} were written"
    digest = file_digest(path)
    if digest != entry["sha256"]:
        return f"{entry['file']}: was changed: its sha256 is {digest[:16]}..., of what was written {entry['sha256'][:16]}..."
    return None
