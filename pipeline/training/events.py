"""Events that workers and Ray's controller report to the driver; on the way, only the reports of all ranks are merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = [
    "AttemptStarted",
    "ControllerStarted",
    "Event",
    "HostReady",
    "SlotEnded",
    "SlotGiven",
    "StepReport",
    "WorkerStarted",
    "WorkersFailed",
    "merge_ledgers",
    "merged",
]


@dataclass(frozen=True)
class ControllerStarted:
    """Ray Train's controller runs; its actor handle can abort it."""

    actor: Any


@dataclass(frozen=True)
class WorkerStarted:
    """A worker's process runs."""

    rank: int
    actor: Any
    """Handle for requests of its heartbeat, and to stop."""
    node: str
    """Name of its host."""
    node_id: str
    """Ray's id of the node."""
    pid: int


@dataclass(frozen=True)
class AttemptStarted:
    """Workers have started to train, for the first time or after a restart."""

    resumed_step: int
    """Step of the checkpoint that they start from; 0 for none."""
    repeated_steps: int | None
    """Steps that will be repeated, where the former workers' last step is known."""
    notes: list[str]
    """Notes of the trainer for the user."""
    skipped: list[int]
    """Steps that were skipped for a loss that isn't finite."""
    setup: dict[str, Any]
    """Device and dtypes of a worker."""


@dataclass(frozen=True)
class StepReport:
    """Records since the last report, up to an optimizer step."""

    step: int
    records: list[dict[str, Any]]
    """Logged metrics, of `metrics.jsonl`."""
    ledger: list[dict[str, Any]]
    """Rows of each step, of `ledger.jsonl`: one rank's, and from the controller on, all ranks'."""
    attempt: AttemptStarted | None = None
    """Set in the first report of an attempt."""
    checkpoint: str | None = None
    """Name of a checkpoint that is complete since the last report; in the first one, of that which the attempt starts from."""


@dataclass(frozen=True)
class HostReady:
    """The workers of a host have loaded the base model: from its first worker to its driver."""

    load_seconds: float
    base_bytes: int
    """Of a worker's copy, or part."""


@dataclass(frozen=True)
class SlotGiven:
    """A run has a slot of a host, whose workers may have to start first: from the host's driver."""

    host: int
    """The host's number, from 0."""


@dataclass(frozen=True)
class SlotEnded:
    """A run on a host has ended, and left its slot."""

    name: str
    """The name by which it has asked for the slot."""
    result: dict[str, Any] | None
    """What `train_job` returned; None if the run failed."""
    failure: str = ""
    """Why it failed, on one line."""
    refused: bool = False
    """Whether it refuses its input, so that another try would fail, too."""
    try_alone: bool = False
    """Whether it may do better without other runs beside it, which have taken memory, or may be at fault themselves."""
    has_raised: bool = False
    """Whether it has failed by an error of its own, which may pass: Ray Train would restart workers of its own."""


@dataclass(frozen=True)
class WorkersFailed:
    """An attempt has ended with errors of workers."""

    failures: dict[int, str]
    """Rank -> reason, on one line."""
    died: list[int]
    """Ranks whose process died, rather than raised an error."""
    time: float
    """Seconds since the epoch."""
    spared: str = ""
    """Why it doesn't count towards the run's `ray.max_failures`, as some don't on a host; empty where it does."""


Event = ControllerStarted | WorkerStarted | HostReady | StepReport | SlotGiven | SlotEnded | WorkersFailed


def merged(reports: Sequence[Any]) -> Any:
    """Merge the reports of all ranks, in their order: each has rows of its own, the rest is rank 0's to report."""
    if not isinstance(reports[0], StepReport):
        return reports[0]
    return replace(reports[0], ledger=merge_ledgers(report.ledger for report in reports))


def merge_ledgers(parts: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the records of all ranks: one record per step, with the sorted rows of all ranks."""
    steps: dict[int, dict[str, Any]] = {}
    for record in (record for part in parts for record in part):
        rows = steps[record["step"]]["row_ids"] if record["step"] in steps else []
        steps[record["step"]] = {**record, "row_ids": sorted(rows + record["row_ids"])}
    return [steps[step] for step in sorted(steps)]
