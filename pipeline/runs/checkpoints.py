"""Storage of checkpoints: uploaded from a worker's folder beside the training, found again after a restart."""

from __future__ import annotations

import logging
import os
import re
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pyarrow import fs

from pipeline.io.retry import STORAGE_ERRORS, with_retries
from strategies.checkpoints.manifest import MANIFEST, missing_manifests, own_files

__all__ = [
    "CHECKPOINT",
    "clean",
    "complete",
    "copy_file",
    "fetch",
    "free_name",
    "is_complete",
    "name_of",
    "rotate",
    "stage",
    "store",
    "step_of",
]

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint-"
NAME = re.compile(r"checkpoint-\d+(\.\d+)?")


def step_of(name: str) -> int:
    """Return the step of a checkpoint's folder: `checkpoint-000010`, or `checkpoint-000010.2` where the first was damaged."""
    return _order(name)[0]


def _order(name: str) -> tuple[int, int]:
    """Return step, and number among the checkpoints of this step."""
    step, _, number = name.removeprefix(CHECKPOINT).partition(".")
    return int(step), int(number or 1)


def stage(folder: Path, rank: int, staging: Path) -> Path:
    """Move this rank's files of a checkpoint to `staging`, from which the trainer won't delete them; return `staging`.

    Every rank must have written its files before.
    """
    for file in own_files(folder, rank):
        target = staging / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    with suppress(OSError):  # other ranks' files are still there
        folder.rmdir()
    return staging


def store(staged: Path, filesystem: fs.FileSystem, target: str, last: re.Pattern[str] = MANIFEST) -> None:
    """Upload the files of a folder, such as a rank's part of a checkpoint, to storage.

    Args:
        last: names of files to upload last, since they mark the folder as complete: a checkpoint's manifest.

    Raises:
        OSError: when storage has failed for minutes, or is full.
    """
    # False sorts before True, so the completing files come last; a checkpoint counts as complete once they are readable.
    files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: bool(last.fullmatch(path.name)))
    for file in files:
        path = f"{target}/{file.relative_to(staged).as_posix()}"
        # Each file by itself: a store that fails now and then would seldom take a whole checkpoint without an error.
        with_retries(partial(copy_file, file, filesystem, path), f"storing {path}")


def copy_file(source: Path, filesystem: fs.FileSystem, path: str) -> None:
    """Copy a file to storage, and create its folder there; on local filesystems the copy is atomic."""
    folder, _, name = path.rpartition("/")
    filesystem.create_dir(folder, recursive=True)
    is_path = isinstance(filesystem, fs.LocalFileSystem)
    # Hidden until it is whole: a killed worker leaves no truncated file under the final name. Object stores do that themselves.
    target = f"{folder}/.{name}.partial" if is_path else path
    # pyarrow's threads can deadlock in uploads to S3: github.com/apache/arrow/issues/32372.
    fs.copy_files(
        str(source), target, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem, use_threads=False
    )
    if is_path:
        filesystem.move(target, path)


def fetch(filesystem: fs.FileSystem, run: str, step: int, target: Path) -> None:
    """Download the complete checkpoint of a step to `target`.

    Raises:
        OSError: where there is none, or when storage has failed for minutes.
    """
    name = name_of(filesystem, run, step)
    copy = partial(
        fs.copy_files, f"{run}/{name}", str(target), source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem()
    )
    target.mkdir(parents=True, exist_ok=True)
    with_retries(copy, f"fetching {name}")


def name_of(filesystem: fs.FileSystem, run: str, step: int) -> str:
    """Return the name of the complete checkpoint of a step. Raises as `fetch`."""
    names = with_retries(partial(complete, filesystem, run), "looking for checkpoints")
    matches = [name for name in names if step_of(name) == step]
    if not matches:
        raise FileNotFoundError(f"{run}: there is no complete checkpoint of step {step}")
    return matches[0]


def complete(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Return the names of checkpoints with all ranks' parts, newest first."""
    # By numbers: as texts, checkpoint-000010.10 would come before checkpoint-000010.2.
    newest = sorted(_folders(filesystem, run), key=_order, reverse=True)
    return [name for name in newest if is_complete(filesystem, f"{run}/{name}")]


def is_complete(filesystem: fs.FileSystem, folder: str) -> bool:
    """Return whether every rank's manifest exists."""
    files = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return not missing_manifests(info.base_name for info in files)


def clean(filesystem: fs.FileSystem, run: str) -> list[str]:
    """Delete incomplete checkpoints of workers that died; return their names. Nothing may be being stored."""
    intact = complete(filesystem, run)
    incomplete = [name for name in _folders(filesystem, run) if name not in intact]
    for name in incomplete:
        filesystem.delete_dir(f"{run}/{name}")
    return incomplete


def rotate(filesystem: fs.FileSystem, run: str, newest: str, limit: int, best: int | None) -> None:
    """Delete complete checkpoints beyond `limit`; where storage fails, they are left for the next time.

    Args:
        newest: name of the checkpoint that was stored last, which stays.
        best: step of the best checkpoint, which stays too; None if there is none.
    """
    try:
        for name in _surplus(complete(filesystem, run), newest, limit, best):
            _delete(filesystem, f"{run}/{name}")
    except STORAGE_ERRORS as error:
        logger.warning("old checkpoints of %s can't be deleted: %s", run, error)


def _surplus(names: list[str], newest: str, limit: int, best: int | None) -> list[str]:
    """Return which of `names` are beyond `limit`: damaged ones first, then the oldest; none unless the newest is complete.

    The run was resumed before a checkpoint of a later step than the newest one's, or of a step that has another: it is damaged.
    """
    if newest not in names:
        return []
    # Oldest first, so that of several checkpoints of a step the last one stays in the dict.
    intact = {step_of(name): name for name in reversed(names) if _order(name) <= _order(newest)}
    kept = [newest, *([intact[best]] if best in intact and intact[best] != newest else [])]
    others = [name for name in reversed(intact.values()) if name not in kept]
    damaged = [name for name in names if name not in intact.values()]
    # In the order in which they are worth keeping.
    return [*others, *damaged][max(0, limit - len(kept)) :]


def _delete(filesystem: fs.FileSystem, folder: str) -> None:
    """Delete a checkpoint, its manifests first: at no moment does a part of it look complete."""
    for info in filesystem.get_file_info(fs.FileSelector(folder)):
        if MANIFEST.fullmatch(info.base_name):
            filesystem.delete_file(info.path)
    filesystem.delete_dir(folder)


def free_name(filesystem: fs.FileSystem, run: str, step: int) -> str:
    """Return an unused name for the checkpoint of a step; an existing one is damaged, and not written over."""
    taken = set(_folders(filesystem, run))
    name = f"{CHECKPOINT}{step:06d}"
    number = 1
    while (name if number == 1 else f"{name}.{number}") in taken:
        number += 1
    return name if number == 1 else f"{name}.{number}"


def _folders(filesystem: fs.FileSystem, run: str) -> list[str]:
    entries: list[Any] = filesystem.get_file_info(fs.FileSelector(run, allow_not_found=True))
    return [info.base_name for info in entries if info.type == fs.FileType.Directory and NAME.fullmatch(info.base_name)]
