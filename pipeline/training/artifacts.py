"""What a run leaves beside checkpoints: folders that a person watches while it goes on, and the model at its end."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from pyarrow import fs
from transformers import TrainerCallback

from pipeline.patience import STORAGE_ERRORS, patiently
from pipeline.storage import is_uri
from pipeline.training.checkpoints import store
from pipeline.training.copying import FolderCopy

__all__ = ["Mirror", "link_watched", "put_model", "watched_folders"]

logger = logging.getLogger(__name__)

COMPLETING = re.compile(r"(adapter_)?config\.json")
"""Without it no library loads a model."""


def watched_folders(cfg: Any) -> list[str]:
    """Names of the folders of a run that a person watches."""
    wanted = {
        "generations": cfg.dpo_generate_during_eval,
        "completions": cfg.trl is not None and cfg.trl.log_completions,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def link_watched(cfg: Any, scratch: Path) -> None:
    """Let the trainer write what is watched into the run's folder itself, where that is a path."""
    for name in [] if is_uri(cfg.output_dir) else watched_folders(cfg):
        (Path(cfg.output_dir) / name).mkdir(exist_ok=True)
        (scratch / name).symlink_to(Path(cfg.output_dir) / name)


class Mirror(TrainerCallback):
    """Copies watched folders to the storage of a run, which can't be linked to, at evaluations, checkpoints and the end.

    A copy that fails is made up for by the next one; the last one waits.
    """

    def __init__(self, scratch: Path, names: list[str], filesystem: fs.FileSystem, run: str) -> None:
        self._names = names
        self._copy = FolderCopy(scratch, names, filesystem, run)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy what is new."""
        self._try(state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy what is new."""
        self._try(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy what is left."""
        if state.is_world_process_zero:
            patiently(self._copy.bring, f"copying {', '.join(self._names)}")

    def _try(self, state: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self._copy.bring()
        except STORAGE_ERRORS as error:
            logger.warning("%s will be copied later: %s", ", ".join(self._names), error)


def put_model(local: Path, filesystem: fs.FileSystem, run: str) -> None:
    """Put a saved model into a run's folder, so that it is complete, or can't be mistaken for a model.

    A path gets it in one move. Object stores have no such thing: there the file without which nothing loads comes last.
    """
    partial, final = f"{run}/model.partial", f"{run}/model"
    is_path = isinstance(filesystem, fs.LocalFileSystem)
    for folder in (partial, final):
        _withdraw(filesystem, folder)
    store(local, filesystem, partial if is_path else final, last=COMPLETING)
    if is_path:
        filesystem.move(partial, final)


def _withdraw(filesystem: fs.FileSystem, folder: str) -> None:
    """Delete a model, first of all what makes it one."""
    found = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    for info in found:
        if COMPLETING.fullmatch(info.base_name):
            filesystem.delete_file(info.path)
    if filesystem.get_file_info(folder).type == fs.FileType.Directory:
        filesystem.delete_dir(folder)
