"""Result of an evaluation: numbers, table and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pipeline.ui.console import Printable, table_of

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

    from pipeline.evaluation.statistics import Estimate

__all__ = ["Evaluation"]

BREAKDOWN = ("rewards/accuracies", "rewards/margins", "average_logps/accuracies", "answers/length", "answers/kl")
"""Columns of the table by source, besides win rates."""


@dataclass(frozen=True)
class Evaluation(Printable):
    """Metrics of a policy, compared with its reference if it has one."""

    policy: str
    reference: str | None
    metrics: Mapping[str, Estimate]
    by_source: Mapping[str, Mapping[str, Estimate]]
    """Source of rows -> its metrics; empty with a single source."""
    confidence: float
    pairs: pandas.DataFrame | None = field(default=None, repr=False)
    """One row per pair with its metrics; None if the data hold no pairs."""
    answers: pandas.DataFrame | None = field(default=None, repr=False)
    """One row per prompt: answers of policy and reference, and rewards."""
    notes: tuple[str, ...] = ()
    """Metrics that aren't available, and why."""

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per source (first `all`) and metric: `value`, `low`, `high`, `n`."""
        import pandas

        parts = {"all": self.metrics, **self.by_source}
        rows = [
            {"source": source, "metric": name, **asdict(estimate)}
            for source, metrics in parts.items()
            for name, estimate in metrics.items()
        ]
        return pandas.DataFrame(rows, columns=["source", "metric", "value", "low", "high", "n"])

    def as_json(self) -> dict[str, Any]:
        """Return all numbers as plain values; NaN becomes None."""
        return {
            "policy": self.policy,
            "reference": self.reference,
            "confidence": self.confidence,
            "metrics": _numbers(self.metrics),
            "by_source": {source: _numbers(metrics) for source, metrics in self.by_source.items()},
            "notes": list(self.notes),
        }

    def __rich__(self) -> Group:
        against = f" against {self.reference}" if self.reference else ""
        columns = ("metric", "mean", f"{self.confidence:.0%} interval", "rows")
        rows = [
            (name, _shown(one.value), f"{_shown(one.low)} to {_shown(one.high)}", one.n) for name, one in self.metrics.items()
        ]
        return Group(
            Text(f"{self.policy}{against}"),
            table_of(columns, rows, whole=("metric",)),
            *([_sources(self)] if self.by_source else []),
            *map(Text, self.notes),
        )


def _sources(result: Evaluation) -> Table:
    wins = [name for name in result.metrics if name.startswith("answers/win_rate/")]
    names = [name for name in (*BREAKDOWN, *wins) if name in result.metrics]
    rows = [(source, *(_short(metrics.get(name)) for name in names)) for source, metrics in result.by_source.items()]
    return table_of(("source", *names), rows, title="by source")


def _short(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{_shown(estimate.value)} ({estimate.n})"


def _shown(value: float) -> str:
    return f"{value:.4g}"


def _numbers(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float | int | None]]:
    # JSON has no NaN, and other parsers reject Python's way of writing it.
    return {
        name: {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(estimate).items()
        }
        for name, estimate in metrics.items()
    }
