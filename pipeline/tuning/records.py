"""What is known of each trial, in `trials.json` of a sweep's folder; tables are made of it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.tuning.space import Values

if TYPE_CHECKING:
    import pandas

__all__ = ["Status", "TrialRecord", "dump", "load", "table_of"]

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
"""`stopped`: ended early, by the scheduler, the time budget or a person."""


@dataclass
class TrialRecord:
    """One trial."""

    number: int
    values: Values | None
    """Of the searched keys; None for the recipe's own values."""
    status: Status = "waiting"
    folder: str | None = None
    """Name of its run's folder in `trials/`; one that went on from another's checkpoint has several, this is the last."""
    step: int = 0
    total_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    tokens: int = 0
    """That it was trained on."""
    seconds: float = 0.0
    """That it had workers, or was waiting for them."""
    reason: str | None = None
    """Why it failed."""
    origins: list[str] = field(default_factory=list)
    """Checkpoints of other trials that it went on from: `trial 3 at step 40`."""
    since: float | None = None
    """When it last began to run, in seconds since the epoch."""

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.number} (recipe)" if self.values is None else str(self.number)

    @property
    def spent(self) -> float:
        """Seconds that it has run, up to now."""
        return self.seconds + (time.time() - self.since if self.since is not None else 0.0)

    @property
    def time_left(self) -> float | None:
        """Seconds to its last step, by its speed so far."""
        if self.since is None or not self.step or self.status != "running":
            return None
        return self.spent / self.step * (self.total_steps - self.step)

    def begin(self) -> None:
        """It runs."""
        self.status, self.since = "running", time.time()

    def end(self, status: Status, reason: str | None = None) -> None:
        """It doesn't run any more."""
        self.seconds = self.spent
        self.status, self.since, self.reason = status, None, reason


def dump(records: list[TrialRecord]) -> str:
    """As JSON."""
    return json.dumps([asdict(record) for record in records], indent=1) + "\n"


def load(rows: list[dict[str, Any]]) -> list[TrialRecord]:
    """From what the JSON holds; a trial that ran when its driver died is waiting again."""
    records = [TrialRecord(**fields) for fields in rows]
    for record in records:
        if record.status in ("running", "paused"):
            record.status, record.since = "waiting", None
    return records


def table_of(records: list[TrialRecord], keys: list[str]) -> pandas.DataFrame:
    """One row per trial: its values, its last metrics, what became of it, what it cost."""
    import pandas

    rows: list[dict[str, Any]] = []
    columns = {key: _column([(record.values or {}).get(key) for record in records]) for key in keys}
    for place, record in enumerate(records):
        values = {key: columns[key][place] for key in keys}
        rows.append(
            {
                "trial": record.number,
                "baseline": record.values is None,
                "status": record.status,
                **values,
                "step": record.step,
                "total_steps": record.total_steps,
                **record.metrics,
                "tokens": record.tokens,
                "seconds": round(record.seconds, 1),
                "went_on_from": "; ".join(record.origins) or None,
                "reason": record.reason,
                "folder": record.folder,
            }
        )
    return pandas.DataFrame(rows)


def _column(values: list[Any]) -> list[Any]:
    """Values of one kind: numbers as they are, anything else as text where there are several kinds, or lists."""
    kinds = {"number" if type(value) in (int, float) else type(value).__name__ for value in values if value is not None}
    if kinds <= {"number"} or kinds in ({"bool"}, {"str"}):
        return values
    return [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
