"""What an evaluation has found, as numbers, as a table, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from pipeline.evaluation.statistics import Estimate

__all__ = ["Evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a policy, beside its reference where it has one."""

    policy: str
    reference: str | None
    metrics: Mapping[str, Estimate]
    by_source: Mapping[str, Mapping[str, Estimate]]
    """Source of the rows -> its metrics; empty where all rows come from one."""
    confidence: float
    pairs: pandas.DataFrame | None = field(default=None, repr=False)
    """One row per pair, its values; None where the data hold no pairs."""
    answers: pandas.DataFrame | None = field(default=None, repr=False)
    """One row per prompt: what policy and reference answered, and rewards."""
    notes: tuple[str, ...] = ()
    """What can't be had here, and why."""

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per source (all of them first) and metric: `value`, `low`, `high`, `n`."""
        import pandas

        parts = {"all": self.metrics, **self.by_source}
        rows = [{"source": source, "metric": name, **asdict(one)} for source, own in parts.items() for name, one in own.items()]
        return pandas.DataFrame(rows, columns=["source", "metric", "value", "low", "high", "n"])

    def as_json(self) -> dict[str, Any]:
        """All numbers, None where there is none."""
        return {
            "policy": self.policy,
            "reference": self.reference,
            "confidence": self.confidence,
            "metrics": _numbers(self.metrics),
            "by_source": {source: _numbers(metrics) for source, metrics in self.by_source.items()},
            "notes": list(self.notes),
        }

    def _repr_html_(self) -> str:
        from html import escape

        table = self.table.to_html(index=False, float_format=lambda value: f"{value:.4g}", border=0)
        compared = f" against {escape(self.reference)}" if self.reference else ""
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<p><b>{escape(self.policy)}</b>{compared}, {self.confidence:.0%} intervals</p>{table}{notes}"


def _numbers(metrics: Mapping[str, Estimate]) -> dict[str, dict[str, float | int | None]]:
    return {
        name: {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in asdict(one).items()}
        for name, one in metrics.items()
    }
