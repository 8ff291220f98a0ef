"""Checkpoints between a worker's folder and the run's storage: stored beside the training, found again when it restarts."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs

from strategies.checkpoints.manifest import MANIFEST, missing_manifests, own_files

__all__ = ["CHECKPOINT", "RAY_STATE", "clean", "free_name", "recorded", "stage", "store", "step_of"]

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
RAY_STATE = "checkpoint_manager_snapshot.json"
PATIENCE_S = 300.0
"""How long storage may fail before the run does."""
LONGEST_PAUSE_S = 15.0
HOPELESS = (errno.ENOSPC, errno.EDQUOT)
"""Errors that waiting doesn't mend."""

T = TypeVar("T")


def step_of(name: str) -> int:
    """The step of a checkpoint's folder: `checkpoint-000010`, or `checkpoint-000010.2` where the first was damaged."""
    return int(name.removeprefix(CHECKPOINT).partition(".")[0])


def stage(folder: Path, rank: int, staging: Path) -> Path:
    """Collect this rank's files of a checkpoint where no rotation removes them: hard links, which cost nothing."""
    for file in own_files(folder, rank):
        link = staging / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, link)
    return staging


def store(staged: Path, filesystem: fs.FileSystem, target: str) -> None:
    """Copy a rank's files into a checkpoint's folder of the storage, the manifest, which completes them, last.

    Raises:
        OSError: when storage has failed for `PATIENCE_S`, or is full.
    """
    files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: bool(MANIFEST.fullmatch(path.name)))
    for file in files:
        path = f"{target}/{file.relative_to(staged).as_posix()}"
        _patiently(partial(_copy, file, filesystem, path), f"storing {path}")


def _copy(source: Path, filesystem: fs.FileSystem, path: str) -> None:
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    fs.copy_files(str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)


def _patiently(work: Callable[[], T], what: str) -> T:
    """Do it again while storage fails, at growing intervals."""
    deadline, pause = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return work()
        except OSError as error:
            if error.errno in HOPELESS or time.monotonic() + pause > deadline:
                raise
            logger.warning("%s failed and is tried again in %.1f s: %s", what, pause, error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def recorded(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Names of the checkpoints that Ray has recorded and that are complete, newest first."""
    newest = sorted(_listed(filesystem, run), key=lambda name: (step_of(name), name), reverse=True)
    return [name for name in newest if is_complete(filesystem, f"{run}/{name}")]


def _listed(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Names of the checkpoints that Ray has recorded."""
    path = f"{run}/{RAY_STATE}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return []
    with filesystem.open_input_stream(path) as file:
        state = json.loads(file.read())
    return [entry["checkpoint_dir_name"] for entry in state["checkpoint_results"]]


def is_complete(filesystem: fs.FileSystem, folder: str) -> bool:
    """Whether every rank's manifest is there."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return not missing_manifests(info.base_name for info in found)


def clean(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Remove what a worker that died has left half stored; returns the names."""
    listed = set(_listed(filesystem, run))
    removed = [name for name in _folders(filesystem, run) if name not in listed]
    for name in removed:
        filesystem.delete_dir(f"{run}/{name}")
    return removed


def free_name(filesystem: fs.FileSystem, run: str, step: int) -> str:
    """A folder's name for a checkpoint; one that stands there already was found damaged, and Ray still lists it."""
    taken = set(_folders(filesystem, run))
    name = f"{CHECKPOINT}{step:06d}"
    number = 1
    while (name if number == 1 else f"{name}.{number}") in taken:
        number += 1
    return name if number == 1 else f"{name}.{number}"


def _folders(filesystem: fs.FileSystem, run: str) -> list[str]:
    found: list[Any] = filesystem.get_file_info(fs.FileSelector(run, allow_not_found=True))
    return [info.base_name for info in found if info.type == fs.FileType.Directory and info.base_name.startswith(CHECKPOINT)]
