"""Finished runs, opened by their folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, reason
from pipeline.runs.folder import CONFIG, MODEL, RUN, RunFolder
from strategies.models.location import ADAPTER_CONFIG

__all__ = ["EXPECTED", "finished_run", "holds_run"]

EXPECTED = "give the output_dir of a run, the folder of a model or an adapter, a .gguf file, or a hub id (owner/name)"
"""Valid values of RUN|MODEL."""
# As in `pipeline.tuning.folder`, which is on a floor above and can't be imported here.
SWEEP = "sweep.json"


def holds_run(location: Location) -> bool:
    """Return whether a folder is that of a run or of a sweep, finished or not.

    Raises:
        UserError: when it can't be read.
    """
    # False for a file too, the listing of which would raise an error.
    if isinstance(location, Path) and not location.is_dir():
        return False
    try:
        return not {RUN, SWEEP}.isdisjoint(Folder(location).names())
    except STORAGE_ERRORS as error:
        raise UserError(f"{str(location)!r} can't be read: {reason(error)}") from error


def finished_run(name: str, location: Location) -> tuple[RunFolder, dict[str, Any]]:
    """Open the folder of a finished run, and read its `run.json`.

    Raises:
        UserError: when it holds a sweep, no run, or an unfinished or incomplete one.
    """
    folder = RunFolder(location)
    try:
        if folder.storage.read(SWEEP) is not None:
            raise UserError(f"{name} holds a sweep; give one of its trials ({name}/trials/...; best.yaml says which is best)")
        state = folder.state()
        if state is None:
            raise UserError(f"no run in {name!r} (no {RUN}); {EXPECTED}")
        if folder.finished_steps() is None:
            how = f"`prefray train {shlex.quote(str(inside(location, CONFIG)))} --resume`"
            raise UserError(f"the run in {name!r} has not finished: {folder.remains()}; finish it with {how}")
        if not {"config.json", ADAPTER_CONFIG} & set(Folder(folder.model).names()):
            raise UserError(f"the run in {name!r} is incomplete: {MODEL}/ holds no model")
        if folder.storage.read(CONFIG) is None:
            raise UserError(f"the run in {name!r} is incomplete: {CONFIG} is missing")
    except STORAGE_ERRORS as error:
        raise UserError(f"{name!r} can't be read: {reason(error)}") from error
    return folder, state
