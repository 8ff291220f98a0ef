"""What the steps of a trial's run have cost, no matter which other trials used the same workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["RunCost", "cost_of"]


@dataclass(frozen=True)
class RunCost:
    """Cost of all steps of a run; 0 for what is unknown."""

    operations: float = 0.0
    """Of the model, counted: they are the same in a slot of a host as with workers of its own."""
    worker_seconds: float = 0.0
    """Seconds of its steps times its workers, without waiting for turns. A joint forward's are divided by tokens."""


def cost_of(records: Sequence[dict[str, Any]], steps: int, workers: int | None) -> RunCost:
    """Sum up the steps of a run.

    Args:
        records: of its `metrics.jsonl`.
        steps: of the whole run, of which the last ones may have no record.
        workers: of the run; None if they were not always the same number.
    """
    timed = [record for record in records if isinstance(record.get("seconds/step"), int | float)]
    starts = [0, *(record["step"] for record in timed)]
    # Each record stands for the steps since the one before.
    covered = [(end - start, record) for start, end, record in zip(starts, starts[1:], timed, strict=False)]
    seconds = sum(number * record["seconds/step"] for number, record in covered)
    operations = [number * record.get("operations/step", 0.0) for number, record in covered]
    whole = steps / starts[-1] if starts[-1] else 0.0
    return RunCost(sum(operations) * whole if all(operations) else 0.0, seconds * whole * (workers or 0))
