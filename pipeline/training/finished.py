"""A run that has finished, as others find it by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.patience import STORAGE_ERRORS
from pipeline.storage import Folder, Location, inside, reason
from pipeline.training.folder import CONFIG, MODEL, RUN, RunFolder
from strategies.locations import ADAPTER_CONFIG

__all__ = ["EXPECTED", "finished_run", "holds_run"]

EXPECTED = "give the output_dir of a run, the folder of a model or an adapter, a .gguf file, or a hub id (owner/name)"
"""What may stand for RUN|MODEL."""
SWEEP = "sweep.json"


def holds_run(where: Location) -> bool:
    """Whether a folder is that of a run or of a sweep, finished or not.

    Raises:
        UserError: when it can't be read.
    """
    if isinstance(where, Path) and not where.is_dir():
        return False
    try:
        return not {RUN, SWEEP}.isdisjoint(Folder(where).names())
    except STORAGE_ERRORS as error:
        raise UserError(f"{str(where)!r} can't be read: {reason(error)}") from error


def finished_run(given: str, where: Location) -> tuple[RunFolder, dict[str, Any]]:
    """The folder of a run that has finished, and what its `run.json` says.

    Raises:
        UserError: when it holds a sweep, no run, or one that has not finished or isn't whole.
    """
    folder = RunFolder(where)
    try:
        if folder.storage.read(SWEEP) is not None:
            raise UserError(f"{given} holds a sweep; give one of its trials ({given}/trials/...; best.yaml says which is best)")
        state = folder.state()
        if state is None:
            raise UserError(f"no run in {given!r} (no {RUN}); {EXPECTED}")
        if folder.finished_steps() is None:
            how = f"`prefray train {inside(where, CONFIG)} --resume`"
            raise UserError(f"the run in {given!r} has not finished: {folder.remains()}; finish it with {how}")
        if not {"config.json", ADAPTER_CONFIG} & set(Folder(folder.model).names()):
            raise UserError(f"the run in {given!r} is incomplete: {MODEL}/ holds no model")
        if folder.storage.read(CONFIG) is None:
            raise UserError(f"the run in {given!r} is incomplete: {CONFIG} is missing")
    except STORAGE_ERRORS as error:
        raise UserError(f"{given!r} can't be read: {reason(error)}") from error
    return folder, state
