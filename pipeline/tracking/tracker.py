"""Base class of trackers, and the trial that they report."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

from pipeline.config import RunConfig
from pipeline.io.storage import Folder, Location
from pipeline.runs.sync import FolderSync
from pipeline.secrets import redact

__all__ = ["EndStatus", "Tracker", "TrialInfo", "flatten", "metrics_of", "name_of"]

EndStatus = Literal["finished", "failed", "killed"]
"""How a run ended; `killed`: by the user, a scheduler, or the sweep that it is a trial of."""
NOT_METRICS = ("step", "time")


@dataclass(frozen=True)
class TrialInfo:
    """A trial in its sweep."""

    sweep: str
    """Name of the sweep."""
    trial: str
    """Name of the trial's folder: `003`, or `003.1` where it resumed from another trial's checkpoint."""
    values: Mapping[str, Any]
    """Values of the searched keys; empty for the baseline."""
    parents: Mapping[str, str] = field(default_factory=dict)
    """Tracker -> id of the sweep's run, for trackers with `nests_trials`."""


class Tracker(ABC):
    """One run, or one sweep, in an experiment tracker. Methods may raise whatever the tracker's library raises.

    Args:
        cfg: the recipe.
        folder: the run's folder.
        trial: set if the run is a trial of a sweep.
        saved: id or name of the run in the tracker, from its first start; empty for a new run.
    """

    label: ClassVar[str]
    """Display name."""
    package: ClassVar[str]
    """The Python package that it needs."""
    name_key: ClassVar[str | None] = None
    """The config key that names the run, and the group of a sweep's trials."""
    variables: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the environment variables that it reads, including secrets."""
    nests_trials: ClassVar[bool] = False
    """Whether a sweep has a run too, in which its trials' runs are nested by the `id` in its `saved`."""
    upload_key: ClassVar[str | None] = None
    """The config key that enables uploading weights."""
    link: str | None = None
    """URL or command to view the run, once it has started."""

    def __init__(self, cfg: RunConfig, folder: Folder, trial: TrialInfo | None, saved: dict[str, Any]) -> None:
        self.cfg, self.folder, self.trial, self.saved = cfg, folder, trial, saved
        name = (self.name_key and getattr(cfg, self.name_key)) or None
        self.group: str | None = (name or trial.sweep) if trial is not None else None
        self.name = f"{self.group}/{trial.trial}" if trial is not None else name or name_of(folder.where)

    @classmethod  # noqa: B027 - trackers override what they need of the methods that do nothing
    def check(cls, cfg: RunConfig) -> None:
        """Raise UserError, within seconds and before anything starts, if a run couldn't report."""

    @abstractmethod
    def start(self) -> None:
        """Begin the run with its recipe, or resume the one that `saved` names; set `saved` and `link`."""

    @abstractmethod
    def log(self, records: list[dict[str, Any]]) -> None:
        """Log records of `metrics.jsonl`, each at its optimizer step."""

    def add_checkpoint(self, name: str) -> None:  # noqa: B027
        """Upload a complete checkpoint of the run's folder, if configured."""

    def add_result(self, metrics: dict[str, float], files: dict[str, str]) -> None:  # noqa: B027
        """Add the best trial's metrics, and the text of files by their names, to the run of a sweep."""

    @abstractmethod
    def finish(self, status: EndStatus) -> None:
        """End the run after the remaining uploads."""

    def uploads_models(self) -> bool:
        """Return whether it uploads weights; a finished run then waits longer."""
        return self.upload_key is not None and getattr(self.cfg, self.upload_key) not in (None, False, "false")

    def recipe(self) -> dict[str, Any]:
        """Return the recipe as nested plain values, without secrets and unset keys."""
        return redact(self.cfg.model_dump(mode="json", exclude_none=True))

    def local_folder(self, name: str) -> tuple[Path, Callable[[], None]]:
        """Return a local folder to write into, and a function that copies its `name` to the run's folder, if that is a URI."""
        if isinstance(self.folder.where, Path):
            return self.folder.where, lambda: None
        local = Path(tempfile.mkdtemp(prefix=f"prefray-{name}-"))
        return local, FolderSync(local, [name], self.folder.filesystem, self.folder.path).sync


def name_of(where: Location) -> str:
    """Return the last part of a path or URI."""
    return PurePosixPath(where.partition("?")[0] if isinstance(where, str) else where).name


def flatten(values: Any, path: str = "") -> dict[str, Any]:
    """Return nested values by dotted paths: `ray.num_workers`, `datasets.0.path`; lists of plain values stay whole."""
    if isinstance(values, list) and any(isinstance(value, dict) for value in values):
        values = dict(enumerate(values))
    if not isinstance(values, dict):
        return {path: values}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{path}.{name}" if path else str(name))
    return flat


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a record, named as in `metrics.jsonl`."""
    return {name: value for name, value in record.items() if name not in NOT_METRICS and value is not None}
