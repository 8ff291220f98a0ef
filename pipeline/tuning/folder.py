"""The folder of a sweep: its recipe, `trials.json`, tables, `best.yaml`, the report, and a run's folder for each trial."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.config import RunConfig, parse_config, parse_yaml
from pipeline.config.secrets import find_redacted, redact
from pipeline.errors import UserError
from pipeline.patience import STORAGE_ERRORS
from pipeline.storage import S3_VARIABLES, Folder, Location, inside, is_uri, locate, reason
from pipeline.tuning.records import TrialRecord, dump, load

if TYPE_CHECKING:
    import pandas

__all__ = ["SweepFolder", "load_sweep", "recipe_text", "started_in"]

SWEEP, CONFIG, RECORDS, BEST, REPORT = "sweep.json", "config.yaml", "trials.json", "best.yaml", "report.html"
TUNE, TRIALS = "tune", "trials"

NO_SWEEP = "--resume: {!r} holds no sweep; give the output_dir of one that `prefray tune` has started"


class SweepFolder:
    """`output_dir` of a sweep: a local path, or a URI as text."""

    def __init__(self, path: Location) -> None:
        self.path = path
        try:
            self.storage = Folder(path)
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(path)!r} can't be reached: {reason(error)}") from error

    def state(self) -> dict[str, Any] | None:
        """What `sweep.json` says; None where there is no sweep. Raises UserError when it is broken."""
        return self.storage.read_json(SWEEP)

    def open(self, cfg: RunConfig, resume: bool) -> None:
        """Make the folder ready for a sweep, or for the continuation of the one that it holds; one without trials is none.

        Raises:
            UserError: when it holds something else, or a sweep that isn't asked to go on, or can't be written.
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
                self.storage.delete(SWEEP)  # of a sweep that ended before its first trial, so nothing of it can go on
                state = None
            if state is not None and not resume:
                raise UserError(
                    f"output_dir: {path!r} holds a sweep ({state['status']}); continue it with `prefray tune --resume {path}`, "
                    "give another output_dir, or delete it"
                )
            if state is None and resume:
                raise UserError(NO_SWEEP.format(path))
            if state is None:
                self.storage.create()
                self.storage.write(CONFIG, recipe_text(cfg))
                self.write_state({"status": "started", "directory": os.getcwd()})
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {path!r} can't be written: {reason(error)}") from error

    def write_state(self, state: dict[str, Any]) -> None:
        """Change what `sweep.json` says."""
        self.storage.write(SWEEP, json.dumps({**(self.state() or {}), **state}, indent=2) + "\n")

    def records(self) -> list[TrialRecord]:
        """Of the trials so far. Raises UserError when `trials.json` is broken."""
        return load(self.storage.read_json(RECORDS) or [])

    def write_records(self, records: list[TrialRecord]) -> None:
        """Write `trials.json`."""
        self.storage.write(RECORDS, dump(records))

    def write_table(self, table: pandas.DataFrame) -> None:
        """Write the table of trials as Parquet and CSV."""
        parquet = io.BytesIO()
        table.to_parquet(parquet, index=False)
        self.storage.write("trials.parquet", parquet.getvalue())
        self.storage.write("trials.csv", table.to_csv(index=False))

    def for_tune(self) -> dict[str, Any]:
        """Arguments of Tune's RunConfig that let it keep its state here."""
        filesystem = self.storage.for_other_processes() if is_uri(str(self.path)) else None
        return {"name": TUNE, "storage_path": self.storage.path, "storage_filesystem": filesystem}

    def environment(self) -> dict[str, str]:
        """Variables by which other processes of the driver find the folder's store."""
        given = S3_VARIABLES if is_uri(str(self.path)) else ()
        return {name: os.environ[name] for name in given if name in os.environ}

    @property
    def trials(self) -> Folder:
        """Where the trials' runs are."""
        return Folder(inside(self.path, TRIALS))

    def trial(self, name: str) -> Location:
        """The folder of a trial's run."""
        return inside(inside(self.path, TRIALS), name)

    def runs_of(self, number: int) -> list[str]:
        """Names of the folders of a trial's runs, oldest first: one that went on from another's checkpoint has several."""
        names = [name for name in self.trials.names() if name.partition(".")[0] == f"{number:03d}"]
        return sorted(names, key=lambda name: int(name.partition(".")[2] or 0))


def recipe_text(cfg: RunConfig) -> str:
    """A recipe as YAML, with the keys that were given, and without secrets."""
    recipe = redact(cfg.model_dump(mode="json", exclude_unset=True, exclude_none=True))
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def load_sweep(where: str) -> RunConfig:
    """The recipe of the sweep in a folder, which may have been moved; its other paths are relative to where it was started.

    Raises:
        UserError: when there is none.
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
    """The directory that a sweep was started in, where it is still there; else the current one."""
    directory = (SweepFolder(locate(cfg.output_dir)).state() or {}).get("directory", "")
    return directory if os.path.isdir(directory) else os.getcwd()
