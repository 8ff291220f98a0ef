"""Records of trials: `trials.json` of a sweep's folder, and the table made from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pipeline.tuning.space import Values

if TYPE_CHECKING:
    import pandas

__all__ = ["Status", "Stay", "TrialRecord", "dump", "keys_of", "load", "table_of"]

Status = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
"""`stopped`: ended early, by the scheduler, the time budget or the user."""


@dataclass
class Stay:
    """A trial's time in a slot of a host, or with workers of its own."""

    host: int | None
    """The host's number; None for workers of its own."""
    began: float
    """Seconds since the epoch."""
    ended: float | None = None
    """None while it stays."""
    why: str = ""
    """Why it had workers of its own."""


@dataclass
class TrialRecord:
    """State, metrics and cost of one trial."""

    number: int
    values: Values | None
    """Values of the searched keys; None for the baseline, which keeps the recipe's values."""
    status: Status = "waiting"
    folder: str | None = None
    """Name of its run's folder in `trials/`; the last one, if it resumed from other trials' checkpoints."""
    step: int = 0
    total_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    tokens: int = 0
    """Tokens trained on."""
    seconds: float = 0.0
    """Time with workers or waiting for them."""
    reason: str | None = None
    """Why it failed."""
    origins: list[str] = field(default_factory=list)
    """Checkpoints of other trials that it resumed from: `trial 3 at step 40`."""
    repeats: int | None = None
    """The finalist that it repeats with another seed."""
    clone_of: int | None = None
    """The trial whose values it has, some of them changed by hand."""
    speed: float = 0.0
    """Tokens per second since its first report, in its last attempt."""
    stays: list[Stay] = field(default_factory=list)
    """Where it was, in a sweep whose trials share a base."""
    operations: float = 0.0
    """`RunCost.operations` of its finished run."""
    worker_seconds: float = 0.0
    """`RunCost.worker_seconds` of its finished run."""
    since: float | None = None
    """Start of the current attempt on this process's monotonic clock."""

    @property
    def name(self) -> str:
        """Label in tables and messages."""
        return f"{self.number} (recipe)" if self.values is None else str(self.number)

    @property
    def shown_host(self) -> str:
        """The host that it has, or had last; `own` for workers of its own, empty where no trials share any."""
        return "" if not self.stays else "own" if self.stays[-1].host is None else str(self.stays[-1].host)

    @property
    def is_candidate(self) -> bool:
        """Whether it may be the best: not a repetition of another trial."""
        return self.repeats is None

    @property
    def spent(self) -> float:
        """Seconds that it has run so far, including the current attempt."""
        return self.seconds + (time.monotonic() - self.since if self.since is not None else 0.0)

    @property
    def time_left(self) -> float | None:
        """Estimated seconds to its last step, by its mean speed so far."""
        if not self.step or self.status != "running":
            return None
        return self.spent / self.step * (self.total_steps - self.step)

    def begin(self) -> None:
        """Mark it as running."""
        self.status, self.since = "running", time.monotonic()

    def end(self, status: Status, reason: str | None = None) -> None:
        """Stop the clock and set the status."""
        self.seconds = self.spent
        self.status, self.since, self.reason = status, None, reason
        self.leave()

    def enter(self, host: int | None, why: str = "") -> None:
        """Note a slot of a host, or workers of its own and the reason for them."""
        self.leave()
        self.stays.append(Stay(host, time.time(), None, why))

    def leave(self) -> None:
        """Note the end of the last stay, if there is one."""
        if self.stays and self.stays[-1].ended is None:
            self.stays[-1].ended = time.time()


def dump(records: list[TrialRecord]) -> str:
    """Serialise records as JSON, with the time until now of those that run."""
    return json.dumps([_plain(record) for record in records], indent=1) + "\n"


def _plain(record: TrialRecord) -> dict[str, Any]:
    stays = [asdict(replace(stay, ended=stay.ended or time.time())) for stay in record.stays]
    return {**asdict(record), "seconds": record.spent, "stays": stays, "since": None}


def load(rows: list[dict[str, Any]], as_they_run: bool = False) -> list[TrialRecord]:
    """Build records from parsed JSON. Trials that were running are waiting again, unless they are taken `as_they_run`."""
    records = [TrialRecord(**{**fields, "stays": [Stay(**stay) for stay in fields.get("stays", [])]}) for fields in rows]
    for record in records:
        record.since = None  # of another process's monotonic clock
        if record.status in ("running", "paused") and not as_they_run:
            record.status = "waiting"
    return records


def table_of(records: list[TrialRecord], keys: list[str]) -> pandas.DataFrame:
    """Return one row per trial: values, status, last metrics, cost."""
    import pandas

    rows: list[dict[str, Any]] = []
    columns = {key: _column([(record.values or {}).get(key) for record in records]) for key in keys}
    for index, record in enumerate(records):
        values = {key: columns[key][index] for key in keys}
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
    table = pandas.DataFrame(rows)
    for name, numbers in {
        "repeats": [record.repeats for record in records],
        "clone_of": [record.clone_of for record in records],
        "host": [record.stays[-1].host if record.stays else None for record in records],
    }.items():
        # Only where a sweep has such trials; as integers, which None would make floats of.
        if any(number is not None for number in numbers):
            table[name] = pandas.array(numbers, dtype="Int64")
    if any(record.stays for record in records):
        table["own_workers_because"] = [(record.stays[-1].why if record.stays else "") or None for record in records]
    return table


def keys_of(searched: Iterable[str], records: Iterable[TrialRecord]) -> list[str]:
    """Return the searched keys, and those that were changed in clones."""
    clones = [record for record in records if record.clone_of is not None]
    return list(dict.fromkeys([*searched, *(key for clone in clones for key in clone.values or {})]))


def _column(values: list[Any]) -> list[Any]:
    """Return values of one type: mixed types and lists become JSON text."""
    kinds = {"number" if type(value) in (int, float) else type(value).__name__ for value in values if value is not None}
    if kinds <= {"number"} or kinds in ({"bool"}, {"str"}):
        return values
    return [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
