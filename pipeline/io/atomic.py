"""Atomic writes of local files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["write_bytes"]


def write_bytes(data: bytes, path: Path) -> None:
    """Write bytes atomically, with the folders above. Raises OSError, and leaves no file then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may write the same file, and the last one wins as a whole.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(data)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
