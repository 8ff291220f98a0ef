"""`prefray report`: write the page of a run or sweep from the files of its folder."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, is_uri, locate, reason
from pipeline.report.run import run_page
from pipeline.report.sweep import sweep_page
from pipeline.runs.folder import REPORT, RunFolder
from pipeline.tuning.folder import SWEEP, SweepFolder
from pipeline.tuning.saved import saved_result
from pipeline.tuning.shared_stages import SharedStages
from strategies.plugins import installed_plugins_only

__all__ = ["write_report"]


def write_report(where: str | Path, output: str | Path | None = None, trust: bool = False) -> Location:
    """Write the page of a run, a trial's run or a sweep, finished or not. Neither Ray nor code of the run is started.

    Args:
        where: its `output_dir`, a path or a URI.
        output: the file to write; `report.html` in that folder when None.
        trust: load the plugins that its config names, if it has keys that only they know.

    Returns:
        Path of the page.

    Raises:
        UserError: when there is no run or sweep, its files are broken, or the page can't be written.
    """
    folder = locate(str(where))
    if output is not None and is_uri(str(output)):
        raise UserError(f"--output: must be a file on this machine, got the URI {str(output)!r}")
    target = inside(folder, REPORT) if output is None else Path(os.path.expanduser(output)).absolute()
    # Before any work, which would be lost.
    if isinstance(target, Path) and target.is_dir():
        if output is None:
            raise UserError(f"{str(target)!r} is a folder; remove it, or give a file with --output")
        raise UserError(f"--output: {str(target)!r} is a folder; give a file, such as {str(target / REPORT)!r}")
    try:
        # A config is data of someone else: parsing it must not import the modules that it names.
        with nullcontext() if trust else installed_plugins_only():
            html = _page(folder)
    except ConfigError as error:
        hint = "" if trust else "\n(if these are its plugins' keys: they are loaded with --trust, if you know who wrote it)"
        raise UserError(f"{error}{hint}") from error
    except STORAGE_ERRORS as error:
        raise UserError(f"{str(folder)!r} can't be read: {reason(error)}") from error
    target_folder, name = (Folder(folder), REPORT) if output is None else (Folder(Path(target).parent), Path(target).name)
    try:
        target_folder.write(name, html)
    except STORAGE_ERRORS as error:
        advice = "give a file with --output" if output is None else "give another file"
        raise UserError(f"{str(target)!r} can't be written: {reason(error)}; {advice}") from error
    return target


def _page(path: Location) -> str:
    run, sweep = RunFolder(path), SweepFolder(path)
    if run.state() is not None:
        return run_page(run)
    if (state := sweep.state()) is not None:
        return _sweep_page(sweep, state)
    if isinstance(path, Path) and path.is_file():
        raise UserError(f"{str(path)!r} is a file; give the output_dir of a run or a sweep")
    there = "holds no run and no sweep" if sweep.storage.names() else "is not there, or empty"
    raise UserError(f"{str(path)!r} {there}; give the output_dir of a run or a sweep")


def _sweep_page(folder: SweepFolder, state: dict[str, Any]) -> str:
    result = saved_result(folder)
    if "shared" not in state:
        raise UserError(
            f"the sweep in {str(folder.path)!r} has no trials yet: its data are prepared, or were when it was stopped"
        )
    try:
        shared = SharedStages(**state["shared"])
    except TypeError as error:
        raise UserError(f"{SWEEP} in {str(folder.path)!r} is broken: {error}; put a whole one back") from error
    return sweep_page(result, folder, shared)
