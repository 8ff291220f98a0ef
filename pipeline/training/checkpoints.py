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

__all__ = ["CHECKPOINT", "RAY_STATE", "clean", "complete", "free_name", "recorded", "repair", "stage", "store", "step_of"]

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


def complete(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Names of the checkpoints that every rank has stored its part of, newest first, recorded by Ray or not yet."""
    newest = sorted(_folders(filesystem, run), key=lambda name: (step_of(name), name), reverse=True)
    return [name for name in newest if is_complete(filesystem, f"{run}/{name}")]


def recorded(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Names of the checkpoints that Ray has recorded."""
    state = _ray_state(filesystem, run)
    return [] if state is None else [entry["checkpoint_dir_name"] for entry in state["checkpoint_results"]]


def _ray_state(filesystem: fs.FileSystem, run: str) -> dict[str, Any] | None:
    path = f"{run}/{RAY_STATE}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as file:
        return json.loads(file.read())


def is_complete(filesystem: fs.FileSystem, folder: str) -> bool:
    """Whether every rank's manifest is there."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return not missing_manifests(info.base_name for info in found)


def clean(filesystem: fs.FileSystem, run: str) -> None:
    """Remove what a worker that died has left half stored."""
    known = {*recorded(filesystem, run), *complete(filesystem, run)}
    for name in _folders(filesystem, run):
        if name not in known:
            filesystem.delete_dir(f"{run}/{name}")


def repair(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Make a stopped run fit to go on: strike recorded checkpoints that aren't complete, which Ray would refuse to start with.

    Returns:
        Their names.
    """
    state = _ray_state(filesystem, run)
    if state is None:
        return []
    sound = set(complete(filesystem, run))
    entries = list(zip(state["checkpoint_results"], state["checkpoint_report_indices"], strict=True))
    kept = [(entry, index) for entry, index in entries if entry["checkpoint_dir_name"] in sound]
    struck = [entry["checkpoint_dir_name"] for entry, _ in entries if entry["checkpoint_dir_name"] not in sound]
    if struck:
        newest = max(kept, key=lambda pair: pair[1], default=(None, 0))[0]
        state |= {"checkpoint_results": [entry for entry, _ in kept], "checkpoint_report_indices": [index for _, index in kept]}
        state |= {"latest_checkpoint_result": newest, "pending_training_results": [], "pending_validation_specs": []}
        with filesystem.open_output_stream(f"{run}/{RAY_STATE}") as file:
            file.write(json.dumps(state).encode())
    clean(filesystem, run)
    return struck


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
