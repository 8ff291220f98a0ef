"""What several tests need and takes long to make: the first that asks makes it, the others find it, in whichever process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

__all__ = ["make_once", "shared_root"]

MADE = ".made"


def shared_root(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same in all of its processes."""
    base = factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    root.mkdir(exist_ok=True)
    return root


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of this run of the tests, filled by `make` when it is first asked for.

    Who asks meanwhile waits. What a failure has left is deleted when the next one asks.
    """
    folder = shared_root(factory) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / MADE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / MADE).touch()
    return folder
