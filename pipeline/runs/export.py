"""Outputs of a run beside checkpoints: folders that a user watches during the run, and the model at its end."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pyarrow import fs
from transformers import TrainerCallback

from pipeline.config import RunConfig
from pipeline.io.retry import STORAGE_ERRORS, with_retries
from pipeline.io.storage import is_uri
from pipeline.runs.checkpoints import store
from pipeline.runs.sync import FolderSync

__all__ = ["SyncFoldersCallback", "link_watched", "put_model", "watched_folders"]

logger = logging.getLogger(__name__)

COMPLETING = re.compile(r"(adapter_)?config\.json")
"""Files without which no library loads a model."""


def watched_folders(cfg: RunConfig) -> list[str]:
    """Return the names of a run's folders that a user watches: sampled generations, traces."""
    enabled = {
        "generations": cfg.dpo_generate_during_eval,
        "completions": cfg.trl is not None and cfg.trl.log_completions,
        "profiles": cfg.profile is not None,
    }
    return [name for name, is_enabled in enabled.items() if is_enabled]


def link_watched(cfg: RunConfig, scratch: Path) -> None:
    """Link watched folders from the trainer's folder into the run's, where that is a local path."""
    for name in [] if is_uri(cfg.output_dir) else watched_folders(cfg):
        (Path(cfg.output_dir) / name).mkdir(exist_ok=True)
        (scratch / name).symlink_to(Path(cfg.output_dir) / name)


class SyncFoldersCallback(TrainerCallback):
    """Uploads watched folders to a run's remote storage at evaluations, checkpoints and the end, those of every node.

    Files of a failed upload are uploaded with the next one; the last one is retried.
    """

    def __init__(self, scratch: Path, names: list[str], filesystem: fs.FileSystem, run: str) -> None:
        self._names = names
        self._folders = FolderSync(scratch, names, filesystem, run)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy what is new."""
        self._try(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy what is new."""
        self._try(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Upload the remaining files."""
        if state.is_local_process_zero:
            with_retries(self._folders.sync, f"copying {', '.join(self._names)}")

    def _try(self, state: Any) -> None:
        if not state.is_local_process_zero:
            return
        try:
            self._folders.sync()
        except STORAGE_ERRORS as error:
            logger.warning("%s will be copied later: %s", ", ".join(self._names), error)


def put_model(local: Path, filesystem: fs.FileSystem, run: str) -> None:
    """Put a saved model into a run's folder; at any time, the model there is complete or can't be loaded.

    On local filesystems the new model is copied, then moved into place. Object stores can't move folders: there the old model
    is deleted first, and the file without which no library loads the new one is uploaded last.
    """
    partial, final, old = (f"{run}/{name}" for name in ("model.partial", "model", "model.old"))
    if not isinstance(filesystem, fs.LocalFileSystem):
        _remove(filesystem, final)
        store(local, filesystem, final, last=COMPLETING)
        return
    for folder in (partial, old):
        _remove(filesystem, folder)
    store(local, filesystem, partial, last=COMPLETING)
    # Moved aside first: a folder can't be moved onto one that has files.
    if filesystem.get_file_info(final).type == fs.FileType.Directory:
        filesystem.move(final, old)
    filesystem.move(partial, final)
    _remove(filesystem, old)


def _remove(filesystem: fs.FileSystem, folder: str) -> None:
    """Delete a model, beginning with the files without which it can't be loaded."""
    files = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    for info in files:
        if COMPLETING.fullmatch(info.base_name):
            filesystem.delete_file(info.path)
    if filesystem.get_file_info(folder).type == fs.FileType.Directory:
        filesystem.delete_dir(folder)
