"""Folder of a sweep: its recipe, `trials.json`, tables, `best.yaml`, the report, and one run folder per trial."""

from __future__ import annotations

import io
import json
import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import RunConfig, parse_config, parse_yaml
from pipeline.errors import UserError
from pipeline.io.outputs import check_output
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, inside, is_uri, locate, reason
from pipeline.secrets import find_redacted, redact
from pipeline.tuning.records import TrialRecord, dump, load

if TYPE_CHECKING:
    import pandas

__all__ = ["earlier_tracker_runs", "SweepFolder", "load_sweep", "recipe_text", "started_in"]

SWEEP, CONFIG, RECORDS, BEST, REPORT = "sweep.json", "config.yaml", "trials.json", "best.yaml", "report.html"
TUNE, FINALISTS, TRIALS, REQUESTS, HOSTS = "tune", "finalists", "trials", "requests", "hosts"

NO_SWEEP = "--resume: {!r} holds no sweep; give the output_dir of one that `prefray tune` has started"


class SweepFolder:
    """`output_dir` of a sweep: a local path or a URI string."""

    def __init__(self, path: Location) -> None:
        self.path = path
        try:
            check_output(str(path))
            self.storage = Folder(path)
        except UserError as error:
            raise UserError(f"output_dir: {error}") from error
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(path)!r} can't be reached: {reason(error)}") from error

    def state(self) -> dict[str, Any] | None:
        """Read `sweep.json`; None where there is no sweep. Raises UserError when it is broken."""
        return self.storage.read_json(SWEEP)

    def open(self, cfg: RunConfig, resume: bool) -> None:
        """Prepare the folder for a new sweep, or for resuming the one in it. A sweep without trials is replaced.

        Raises:
            UserError: when it holds other files, or a sweep without `resume`, or can't be written.
        """
        path = str(self.path)
        try:
            others = [name for name in self.storage.names() if not name.startswith(".")]
            state = self.state()
            if state is None and others:
                names = ", ".join(sorted(others)[:3])
                raise UserError(
                    f"output_dir: {path!r} is not empty ({names}) and holds no sweep; give another folder, or empty it"
                )
            if state is not None and not resume and not self.records():
                self.storage.delete(SWEEP)  # that sweep ended before its first trial: there is nothing to resume
                state = None
            if state is not None and not resume:
                raise UserError(
                    f"output_dir: {path!r} holds a sweep ({state['status']}); continue it with "
                    f"`prefray tune --resume {shlex.quote(str(path))}`, "
                    "give another output_dir, or delete it"
                )
            if state is None and resume:
                raise UserError(NO_SWEEP.format(path))
            if state is None:
                self.storage.create()
                # Before `sweep.json`, which makes the folder a sweep's: `load_sweep` needs both.
                self.storage.write(CONFIG, recipe_text(cfg))
                # A sweep may be resumed from elsewhere, and its recipe's relative paths are relative to this directory.
                self.write_state({"status": "started", "directory": os.getcwd()})
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {path!r} can't be written: {reason(error)}") from error

    def write_state(self, state: dict[str, Any]) -> None:
        """Update keys of `sweep.json`."""
        self.storage.write(SWEEP, json.dumps({**(self.state() or {}), **state}, indent=2) + "\n")

    def records(self, as_they_run: bool = False) -> list[TrialRecord]:
        """Read the trial records. Raises UserError when `trials.json` is broken.

        Args:
            as_they_run: another process may be running them; if not, those that ran when they were written are waiting again.
        """
        return load(self.storage.read_json(RECORDS) or [], as_they_run)

    def write_records(self, records: list[TrialRecord]) -> None:
        """Write `trials.json`."""
        self.storage.write(RECORDS, dump(records))

    def write_table(self, table: pandas.DataFrame) -> None:
        """Write `trials.parquet` and `trials.csv`."""
        parquet = io.BytesIO()
        table.to_parquet(parquet, index=False)
        self.storage.write("trials.parquet", parquet.getvalue())
        self.storage.write("trials.csv", table.to_csv(index=False))

    def for_tune(self, name: str) -> dict[str, Any]:
        """Return arguments of Tune's RunConfig that store its state in this folder, in a folder `name`."""
        filesystem = self.storage.for_other_processes() if is_uri(str(self.path)) else None
        return {"name": name, "storage_path": self.storage.path, "storage_filesystem": filesystem}

    @property
    def trials(self) -> Folder:
        """Folder of the trials' runs."""
        return Folder(inside(self.path, TRIALS))

    @property
    def requests(self) -> Folder:
        """Folder of other processes' requests to the driver."""
        return self.storage.subfolder(REQUESTS)

    def trial(self, name: str) -> Location:
        """Return the folder of one trial run."""
        return inside(inside(self.path, TRIALS), name)

    def runs_of(self, number: int) -> list[str]:
        """List the run folders of a trial, oldest first; a trial that resumed from other trials' checkpoints has several."""
        names = [name for name in self.trials.names() if name.partition(".")[0] == f"{number:03d}"]
        # By numbers: as text, 003.10 would come before 003.2.
        return sorted(names, key=lambda name: int(name.partition(".")[2] or 0))


def recipe_text(cfg: RunConfig) -> str:
    """Return a recipe as YAML: only the keys that were set, secrets redacted."""
    recipe = redact(cfg.model_dump(mode="json", exclude_unset=True, exclude_none=True))
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def load_sweep(where: str) -> RunConfig:
    """Read the recipe of the sweep in a folder, whose `output_dir` becomes that folder: it may have been moved.

    Other relative paths stay relative to the directory that the sweep was started in.

    Raises:
        UserError: when there is no sweep.
    """
    folder = SweepFolder(locate(where))
    try:
        state, text = folder.state(), folder.storage.read(CONFIG)
    except STORAGE_ERRORS as error:
        raise UserError(f"--resume: {where!r} can't be read: {reason(error)}") from error
    if state is None or text is None:
        raise UserError(NO_SWEEP.format(where))
    values, origin = parse_yaml(text, CONFIG), str(inside(folder.path, CONFIG))
    if redacted := [key for key, _ in find_redacted(values)]:
        raise UserError(
            f"--resume: {origin}: {', '.join(redacted)} held a secret, which isn't saved; write it into that file for as long "
            "as the sweep runs, or start another with the secret in the environment"
        )
    cfg = parse_config(values, origin=origin)
    return cfg.model_copy(update={"output_dir": str(folder.path)})


def started_in(cfg: RunConfig) -> str:
    """Return the directory that a sweep was started in, or the current one if it no longer exists."""
    directory = (SweepFolder(locate(cfg.output_dir)).state() or {}).get("directory", "")
    return directory if os.path.isdir(directory) else os.getcwd()


def earlier_tracker_runs(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what names a sweep's runs in trackers where an earlier version saved it: in `sweep.json`.

    Args:
        state: of the sweep.
    """
    return {"mlflow": {"id": state["mlflow"]}} if "mlflow" in state else {}
