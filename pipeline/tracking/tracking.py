"""All trackers of a run: begun once, told every record once, told how the run ended."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.secrets import redact_text
from pipeline.display import Display
from pipeline.errors import RunCancelled, RunStopped, UserError
from pipeline.paths import is_in_job_package
from pipeline.patience import STORAGE_ERRORS, patiently
from pipeline.tracking import to_mlflow, to_trackio, to_wandb
from pipeline.tracking.line import Line
from pipeline.tracking.run import Membership, Status, TrackedRun, Tracker
from pipeline.tracking.to_mlflow import ToMLflow
from pipeline.tracking.to_tensorboard import ToTensorBoard
from pipeline.tracking.to_trackio import ToTrackio
from pipeline.tracking.to_wandb import ToWandb
from pipeline.training.folder import RunFolder
from pipeline.training.metrics import MetricsFile, identity
from strategies.trackers import used_trackers

__all__ = ["Tracking", "check_trackers", "tracker_variables"]

KINDS: dict[str, type[Tracker]] = {
    "tensorboard": ToTensorBoard,
    "wandb": ToWandb,
    "mlflow": ToMLflow,
    "trackio": ToTrackio,
}
CHECKS = {"wandb": to_wandb.check, "mlflow": to_mlflow.check, "trackio": to_trackio.check}
PACKAGES = {"tensorboard": "tensorboardX"}
VARIABLES = ("WANDB_", "MLFLOW_", "TRACKIO_", "DATABRICKS_", "HF_TOKEN", "HF_HOME")
"""Beginnings of the variables that trackers read."""
KEPT = "trackers.json"
CLOSE_WITHIN_S: dict[Status, float] = {"finished": 300.0, "failed": 30.0, "killed": 15.0}
"""How long a run that has ended waits for its trackers."""
UPLOAD_WITHIN_S = 4 * 3600.0
"""Where they are given models, too."""


def check_trackers(cfg: RunConfig) -> None:
    """Say before anything starts what would keep a tracker from reporting.

    Raises:
        UserError: for a package that is missing, a key that isn't there, a server that can't be reached.
    """
    for name in used_trackers(cfg):
        package = PACKAGES.get(name, name)
        if find_spec(package) is None:
            raise UserError(
                f"use_{name}: {package} is not installed; pip install 'prefray[trackers]', or remove the tracker's keys"
            )
        if name == "mlflow" and is_in_job_package() and not (cfg.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            raise UserError("mlflow_tracking_uri: a job's own folder is deleted after it; give a server, or an absolute path")
        if name in CHECKS:
            CHECKS[name](cfg)


def tracker_variables(cfg: RunConfig) -> dict[str, str]:
    """Variables of this process by which others on its node report to the same trackers."""
    if not used_trackers(cfg):
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}


class Tracking:
    """The trackers of one run.

    Args:
        cfg: the recipe.
        folder: the run's; what names its tracker runs is kept there.
        resume: whether it goes on with the run that the folder holds; asked before the folder is opened.
        member: the sweep that it is a trial of. A sweep doesn't fail for its trackers: what is wrong is a note.
    """

    def __init__(self, cfg: RunConfig, folder: RunFolder, resume: bool, member: Membership | None = None) -> None:
        self._cfg, self._folder, self._member = cfg, folder, member
        self._names = used_trackers(cfg)
        self._lines: dict[str, Line] = {}
        self._notes: list[str] = []
        self._kept: dict[str, Any] = {}
        seen: set[tuple[int, str]] = set()
        if resume and self._names:
            with contextlib.suppress(*STORAGE_ERRORS):  # the run itself will say so
                self._kept = json.loads(folder.storage.read(KEPT) or "{}")
                seen = {identity(record) for record in MetricsFile(folder.metrics).read()}
        self._told = {name: set(seen) if name in self._kept else set() for name in self._names}

    @contextlib.contextmanager
    def running(self, display: Display) -> Iterator[None]:
        """The time that the run runs: trackers begin before it, and are told how it ends.

        Raises:
            UserError: when a tracker can't begin.
        """
        status: Status = "failed"
        try:
            self._start(display)
            yield
            status = "finished"
        except (RunCancelled, RunStopped, KeyboardInterrupt):
            status = "killed"
            raise
        finally:
            for line in self._lines.values():
                line.close(partial(line.tracker.finish, status), self._patience(status))
            for note in self.notes():
                display.note(note)

    def _patience(self, status: Status) -> float:
        uploads = self._cfg.wandb_log_model or self._cfg.hf_mlflow_log_artifacts
        return UPLOAD_WITHIN_S if uploads and status == "finished" else CLOSE_WITHIN_S[status]

    def log(self, records: list[dict[str, Any]]) -> None:
        """Tell records that haven't been told: a run that goes on from a checkpoint repeats some."""
        for name, line in self._lines.items():
            if new := [record for record in records if identity(record) not in self._told[name]]:
                self._told[name].update(map(identity, new))
                line.tell(partial(line.tracker.log, new))

    def add_checkpoint(self, name: str) -> None:
        """A checkpoint is complete."""
        for line in self._lines.values():
            line.tell(partial(line.tracker.add_checkpoint, name))

    def notes(self) -> list[str]:
        """What a person should know, since it was last asked."""
        found, self._notes = self._notes, []
        return [*found, *(note for line in self._lines.values() for note in line.notes())]

    def _start(self, display: Display) -> None:
        for name in self._names:
            tracker = KINDS[name]()
            run = TrackedRun(self._cfg, self._folder.storage, self._member, self._kept.get(name, {}))
            try:
                self._kept[name] = tracker.start(run)
            except Exception as error:  # libraries raise what they like; a sweep goes on without them
                why = f"{tracker.label} can't begin the run: {redact_text(str(error) or type(error).__name__)}"
                if self._member is None:
                    raise UserError(f"use_{name}: {why}") from error
                self._notes.append(why)
                continue
            self._lines[name] = Line(tracker)
            if tracker.link is not None:
                display.note(f"{tracker.label}: {tracker.link}")
        if self._names:
            text = json.dumps(self._kept, indent=2) + "\n"
            patiently(partial(self._folder.storage.write, KEPT, text), f"writing {KEPT}")
