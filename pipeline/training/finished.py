"""A run that has finished, as others find it by its folder."""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import UserError
from pipeline.patience import STORAGE_ERRORS
from pipeline.storage import Location, reason
from pipeline.training.folder import RunFolder

__all__ = ["EXPECTED", "finished_run"]

EXPECTED = "give the output_dir of a run, the folder of a model or an adapter, a .gguf file, or a hub id (owner/name)"
"""What may stand for RUN|MODEL."""


def finished_run(given: str, where: Location) -> tuple[RunFolder, dict[str, Any]]:
    """The folder of a run that has finished, and what its `run.json` says.

    Raises:
        UserError: when it holds a sweep, no run, or one that has not finished.
    """
    folder = RunFolder(where)
    try:
        if folder.storage.read("sweep.json") is not None:
            best = (_json(folder, "trials.json") or [{}])[0]
            trial = best.get("folder") or "000" if isinstance(best, dict) else "000"
            raise UserError(f"{given} holds a sweep; give one of its trials, such as {given}/trials/{trial}")
        state = _json(folder, "run.json")
        if state is None:
            raise UserError(f"no run in {given!r} (no run.json); {EXPECTED}")
        if state.get("status") != "finished" or not folder.storage.has_folder("model"):
            remains = folder.remains()
            raise UserError(f"the run in {given!r} has not finished: {remains}; finish it with `prefray train ... --resume`")
        if folder.storage.read("config.yaml") is None:
            raise UserError(f"the run in {given!r} is incomplete: config.yaml is missing")
    except STORAGE_ERRORS as error:
        raise UserError(f"{given!r} can't be read: {reason(error)}") from error
    return folder, state


def _json(folder: RunFolder, name: str) -> Any:
    text = folder.storage.read(name)
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise UserError(f"{folder.path}/{name} can't be read: {error}") from error
