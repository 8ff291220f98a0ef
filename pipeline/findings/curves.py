"""Metrics of a run as curves over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ui.findings import Evidence

__all__ = ["Curve", "Curves"]

PART = 10
"""The mean of the first or last tenth of a curve stands for its start or end, since single batches are noisy."""


@dataclass(frozen=True)
class Curve:
    """The finite values of one metric."""

    name: str
    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    """Shape (points,)."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def first(self) -> float:
        """First value."""
        return float(self.values[0])

    @property
    def last(self) -> float:
        """Last value."""
        return float(self.values[-1])

    @property
    def start(self) -> float:
        """Mean of the first tenth of the values."""
        return float(self.values[: self._part].mean())

    @property
    def end(self) -> float:
        """Mean of the last tenth of the values."""
        return float(self.values[-self._part :].mean())

    @property
    def _part(self) -> int:
        return max(1, len(self.values) // PART)

    def between(self, first: int, last: int) -> Curve:
        """Return the points from step `first` to step `last`, both included."""
        kept = (self.steps >= first) & (self.steps <= last)
        return Curve(self.name, self.steps[kept], self.values[kept])

    def at(self, index: int) -> Evidence:
        """Return a point as evidence."""
        return Evidence(self.name, float(self.values[index]), int(self.steps[index]))

    def ends(self) -> tuple[Evidence, Evidence]:
        """Return start and end as evidence, each with the step that it reaches up to or begins from."""
        part = self._part
        start = Evidence(self.name, self.start, int(self.steps[part - 1]))
        return start, Evidence(self.name, self.end, int(self.steps[-1]))


class Curves:
    """Curves of a run's records.

    Args:
        records: of `metrics.jsonl`, sorted by step.
    """

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self._records = records
        self._curves: dict[str, Curve] = {}

    def __getitem__(self, name: str) -> Curve:
        """Return a metric's curve, empty if it was never recorded."""
        if name not in self._curves:
            self._curves[name] = self._read(name)
        return self._curves[name]

    def _read(self, name: str) -> Curve:
        found = [(record["step"], record[name]) for record in self._records if name in record]
        steps = np.array([step for step, _ in found], dtype=np.int64)
        # Values that aren't finite are null in the file, since JSON has none.
        values = np.array([value if isinstance(value, int | float) else np.nan for _, value in found], dtype=np.float64)
        finite = np.isfinite(values)
        return Curve(name, steps[finite], values[finite])

    @property
    def last_step(self) -> int:
        """Last recorded step."""
        return max((record["step"] for record in self._records), default=0)

    def evaluated_or_trained(self, name: str) -> Curve:
        """Return a metric's curve of the evaluations if there are two or more, else that of training."""
        evaluated = self[f"eval_{name}"]
        return evaluated if len(evaluated) > 1 else self[name]
