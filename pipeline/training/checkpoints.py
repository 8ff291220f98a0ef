"""Checkpoints between a worker's folder and the run's storage: stored beside the training, found again when it restarts."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline.patience import patiently
from strategies.checkpoints.manifest import MANIFEST, missing_manifests, own_files

__all__ = [
    "CHECKPOINT",
    "RAY_STATE",
    "clean",
    "complete",
    "copy_file",
    "fetch",
    "free_name",
    "recorded",
    "repair",
    "stage",
    "store",
    "step_of",
]

CHECKPOINT = "checkpoint-"
NAME = re.compile(r"checkpoint-\d+(\.\d+)?")
RAY_STATE = "checkpoint_manager_snapshot.json"


def step_of(name: str) -> int:
    """The step of a checkpoint's folder: `checkpoint-000010`, or `checkpoint-000010.2` where the first was damaged."""
    return _order(name)[0]


def _order(name: str) -> tuple[int, int]:
    """Step and number among those of this step."""
    step, _, number = name.removeprefix(CHECKPOINT).partition(".")
    return int(step), int(number or 1)


def stage(folder: Path, rank: int, staging: Path) -> Path:
    """Collect this rank's files of a checkpoint where no rotation removes them: hard links, which cost nothing."""
    for file in own_files(folder, rank):
        link = staging / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, link)
    return staging


def store(staged: Path, filesystem: fs.FileSystem, target: str, last: re.Pattern[str] = MANIFEST) -> None:
    """Copy the files of a folder, such as a rank's part of a checkpoint, to storage.

    Args:
        last: what completes them and is copied last: a checkpoint's manifest.

    Raises:
        OSError: when storage has failed for minutes, or is full.
    """
    files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: bool(last.fullmatch(path.name)))
    for file in files:
        path = f"{target}/{file.relative_to(staged).as_posix()}"
        patiently(partial(copy_file, file, filesystem, path), f"storing {path}")


def copy_file(source: Path, filesystem: fs.FileSystem, path: str) -> None:
    """Copy a file to storage, and make the folder that it goes to."""
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    # Threads of pyarrow that upload to S3 can wait for each other for ever: github.com/apache/arrow/issues/32372.
    fs.copy_files(
        str(source), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem, use_threads=False
    )


def fetch(filesystem: fs.FileSystem, run: str, step: int, target: Path) -> None:
    """Copy the checkpoint of a step from storage, where it is complete.

    Raises:
        OSError: where it isn't, or when storage has failed for minutes.
    """
    name = next(
        (name for name in patiently(partial(complete, filesystem, run), "looking for checkpoints") if step_of(name) == step),
        None,
    )
    if name is None:
        raise FileNotFoundError(f"{run}: there is no complete checkpoint of step {step}")
    copy = partial(
        fs.copy_files, f"{run}/{name}", str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
    )
    target.mkdir(parents=True, exist_ok=True)
    patiently(copy, f"fetching {name}")


def complete(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Names of the checkpoints that every rank has stored its part of, newest first, recorded by Ray or not yet."""
    newest = sorted(_folders(filesystem, run), key=_order, reverse=True)
    return [name for name in newest if is_complete(filesystem, f"{run}/{name}")]


def recorded(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Names of the checkpoints that Ray has recorded."""
    state = _ray_state(filesystem, run)
    return [] if state is None else [entry["checkpoint_dir_name"] for entry in state["checkpoint_results"]]


def _ray_state(filesystem: fs.FileSystem, run: str) -> dict[str, Any] | None:
    """What Ray has recorded; None without a record, or with one that a kill has cut off, for Ray writes it in place."""
    path = f"{run}/{RAY_STATE}"
    if filesystem.get_file_info(path).type != fs.FileType.File:
        return None
    with filesystem.open_input_stream(path) as file:
        content = file.read()
    try:
        return json.loads(content)
    except ValueError:
        return None


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

    A record that can't be read is removed: the checkpoints are complete by their manifests, and are recorded again.

    Returns:
        Names of those that were struck.
    """
    state = _ray_state(filesystem, run)
    if state is None:
        if filesystem.get_file_info(f"{run}/{RAY_STATE}").type == fs.FileType.File:
            filesystem.delete_file(f"{run}/{RAY_STATE}")
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
    return [info.base_name for info in found if info.type == fs.FileType.Directory and NAME.fullmatch(info.base_name)]
