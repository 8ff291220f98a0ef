"""Digests of files, and checks against manifests. Each unchanged file is read once per process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["as_written", "damage", "difference", "file_digest", "once", "size_difference", "written"]

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


def written(data: bytes) -> dict[str, Any]:
    """Return a manifest's fields for a file with these bytes."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def difference(data: bytes, entry: dict[str, Any]) -> str | None:
    """Return how a file's bytes differ from its manifest, as `damage`."""
    return _compared(written(data), entry)


def damage(path: Path, entry: dict[str, Any]) -> str | None:
    """Return how a file differs from its manifest, in a phrase; None where it is intact.

    Args:
        entry: fields of `as_written`, and the `file`'s name. Raises KeyError without them.
    """
    if not path.is_file():
        return f"{entry['file']}: is missing"
    # The size first: most damage needs no reading.
    return size_difference(path.stat().st_size, entry) or _compared(as_written(path), entry)


def size_difference(size: int | None, entry: dict[str, Any]) -> str | None:
    """Return how a file's size, None where there is none, differs from its manifest, as `damage`."""
    if size is None:
        return f"{entry['file']}: is missing"
    return f"{entry['file']}: has {size} bytes, {entry['bytes']} were written" if size != entry["bytes"] else None


def _compared(found: dict[str, Any], entry: dict[str, Any]) -> str | None:
    digest = found["sha256"]
    if digest == entry["sha256"]:
        return None
    if problem := size_difference(found["bytes"], entry):
        return problem
    return f"{entry['file']}: was changed: its sha256 is {digest[:16]}..., of what was written {entry['sha256'][:16]}..."
