"""What trackers are told of a run: its name, its group, its recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

from pipeline.config import RunConfig
from pipeline.config.secrets import redact
from pipeline.storage import Folder, Location

__all__ = ["Membership", "Status", "TrackedRun", "Tracker", "flat", "metrics_of", "name_of", "recipe_of"]

Status = Literal["finished", "failed", "killed"]
"""How a run ended; `killed`: by a person, a scheduler, or the sweep that it is a trial of."""
NOT_METRICS = ("step", "time")


@dataclass(frozen=True)
class Membership:
    """A trial in its sweep."""

    sweep: str
    """Name of the sweep."""
    trial: str
    """Name of the trial's folder: `003`, or `003.1` where it went on from another trial's checkpoint."""
    values: Mapping[str, Any]
    """Of the searched keys; empty for the recipe's own."""
    parent: str | None = None
    """MLflow's id of the sweep's run."""


@dataclass(frozen=True)
class TrackedRun:
    """A run, as trackers are to show it."""

    cfg: RunConfig
    folder: Folder
    member: Membership | None
    kept: dict[str, Any] = field(default_factory=dict)
    """What the tracker gave back when the run was begun; empty for a new one."""

    def name(self, given: str | None) -> str:
        """Its name: as given, or the last part of `output_dir`; of a trial, after the name of its group."""
        if self.member is not None:
            return f"{self.group(given)}/{self.member.trial}"
        return given or name_of(self.folder.where)

    def group(self, given: str | None) -> str | None:
        """The sweep that it is a trial of."""
        return None if self.member is None else given or self.member.sweep


class Tracker(Protocol):
    """One experiment tracker; its methods may raise whatever its library raises."""

    label: str
    """As its users call it."""
    link: str | None
    """Where the run can be looked at, once it has started."""

    def start(self, run: TrackedRun) -> dict[str, Any]:
        """Begin the run, or go on with the one that `run.kept` names; returns what names it."""

    def log(self, records: list[dict[str, Any]]) -> None:
        """Log records of `metrics.jsonl`."""

    def add_checkpoint(self, name: str) -> None:
        """A checkpoint of this name is complete in the run's folder."""

    def finish(self, status: Status) -> None:
        """Say how the run has ended."""


def name_of(where: Location) -> str:
    """The last part of a path or URI."""
    return PurePosixPath(str(where).partition("?")[0]).name


def recipe_of(cfg: RunConfig) -> dict[str, Any]:
    """A recipe as nested plain values, without its secrets and without what isn't set."""
    return redact(cfg.model_dump(mode="json", exclude_none=True))


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested values by their dotted paths: `ray.num_workers`, `datasets.0.path`; lists of plain values stay whole."""
    if isinstance(values, dict):
        items: Any = values.items()
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        items = enumerate(values)
    else:
        return {path: values}
    found: dict[str, Any] = {}
    for name, value in items:
        found.update(flat(value, f"{path}.{name}" if path else str(name)))
    return found


def metrics_of(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record, by the names that `metrics.jsonl` has."""
    return {name: value for name, value in record.items() if name not in NOT_METRICS and value is not None}
