"""Sweeps as other processes see them: read from their folders, and changed while they run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import chdir
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from pipeline.config import parse_saved
from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import inside, locate, reason
from pipeline.runs.owner import owner_of
from pipeline.tuning.folder import CONFIG, RECORDS, SweepFolder, started_in
from pipeline.tuning.objective import resolve_objective
from pipeline.tuning.requests import CloneTrial, StopTrial, send
from pipeline.tuning.result import SweepResult
from pipeline.tuning.space import check_trials, corners
from pipeline.tuning.table import hosts_line
from pipeline.ui.console import Printable
from strategies.plugins import installed_plugins_only

if TYPE_CHECKING:
    import pandas

__all__ = ["Sweep", "open_sweep", "saved_result"]


def saved_result(folder: SweepFolder) -> SweepResult:
    """Read a sweep's trials, finished or not, from its folder.

    Raises:
        UserError: when files of it are missing or broken.
    """
    text, origin = folder.storage.read(CONFIG), str(inside(folder.path, CONFIG))
    if text is None:
        raise UserError(f"{str(folder.path)!r} holds a part of a sweep: {CONFIG} is missing; put it back")
    # The folder may have been moved since.
    cfg = parse_saved(text, origin).model_copy(update={"output_dir": str(folder.path)})
    if cfg.tune is None:
        raise UserError(
            f"{origin}: the recipe of a sweep has a `tune:` section, and this one has none; put the whole file back"
        )
    try:
        records = folder.records()
    except TypeError as error:
        raise UserError(f"{RECORDS} in {str(folder.path)!r} is broken: {error}; put a whole one back") from error
    with chdir(started_in(cfg)):  # the recipe's paths are relative to it
        return SweepResult(folder.path, cfg, resolve_objective(cfg.tune, check_trials(cfg, corners(cfg.tune))), records)


class Sweep(Printable):
    """A sweep that this or another process runs; drawn as the table of its trials."""

    def __init__(self, where: str | Path) -> None:
        """Open the sweep in a folder, a path or a URI. Raises UserError when there is none."""
        self.folder = SweepFolder(locate(str(where)))
        try:
            if self.folder.state() is None:
                raise UserError(f"{str(where)!r} holds no sweep; give the output_dir of one that `prefray tune` has started")
        except STORAGE_ERRORS as error:
            raise UserError(f"{str(where)!r} can't be read: {reason(error)}") from error

    @cached_property
    def _first_read(self) -> SweepResult:
        with installed_plugins_only():  # the recipe is data of someone else
            return saved_result(self.folder)

    @property
    def result(self) -> SweepResult:
        """The trials as they stand now."""
        first, is_run = self._first_read, owner_of(self.folder.storage) is not None
        return SweepResult(first.run_dir, first.cfg, first.measure, self.folder.records(as_they_run=is_run))

    @property
    def table(self) -> pandas.DataFrame:
        """One row per trial: values, status, metrics of the last evaluation, cost."""
        return self.result.table

    def stop(self, trial: int) -> str:
        """End a trial, whose place the next one gets; its checkpoints stay.

        Returns:
            What the driver has done, as a sentence.

        Raises:
            UserError: when there is no such trial, it has ended, it is the last one, or no driver runs the sweep.
        """
        return send(self.folder, StopTrial(trial))

    def clone(self, trial: int, changes: Mapping[str, Any], warm_start: bool = False) -> str:
        """Add a trial with the values of another one, some of them changed; it begins when there is room.

        Args:
            trial: number of the other one, in any state.
            changes: dotted key of the recipe -> value; None leaves the key unset.
            warm_start: resume from the other one's last checkpoint (weights, optimizer, schedule), instead of the beginning.

        Returns:
            What the driver has done, as a sentence.

        Raises:
            UserError: when there is no such trial, the changes don't make another trial of this sweep, or no driver runs it.
        """
        return send(self.folder, CloneTrial(trial, dict(changes), warm_start))

    def __rich__(self) -> Group:
        state = self.folder.state() or {}
        if state.get("status") == "finished":
            return self.result.__rich__()
        result, shared = self.result, state.get("shared", {})
        hosts, is_running = shared.get("copies", 0), any(record.status == "running" for record in result.records)
        line = hosts_line(result.records, hosts, shared["slots"] // hosts) if hosts and is_running else ""
        return Group(*result.tables(line))


def open_sweep(where: str | Path) -> Sweep:
    """Open a sweep that another process runs, or has run: to look at its trials, end some, or add others.

    Args:
        where: its `output_dir`, a path or a URI.

    Raises:
        UserError: when there is no sweep.
    """
    return Sweep(where)
