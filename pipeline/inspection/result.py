"""What an inspection has found: findings, and the columns of every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from pipeline.data.store import EVAL, TRAIN, Prepared
from pipeline.inspection.columns import RowColumns
from pipeline.ui.console import Printable, lines_of, table_of
from pipeline.ui.findings import Finding, finding_lines

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.reference import Scores

__all__ = ["FINDINGS", "NOTHING", "QUANTILES", "Inspection"]

NOTHING = "nothing odd was found in these data"

FINDINGS = "findings.json"
"""File beside the columns with what an inspection has found, for the pages of runs on the same data."""
QUANTILES = {"lowest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "highest": 1.0}
NOT_SHOWN = (
    *("split", "row_id", "duplicate_of", "prompt_in_both"),
    *("chosen_first_token", "rejected_first_token", "completion_first_token"),
)
"""Columns without quantiles."""


@dataclass(frozen=True)
class Inspection(Printable):
    """What `inspect` has found about prepared data."""

    prepared: Prepared
    scores: Scores | None
    """The reference's cached scores; None where there are none."""
    findings: tuple[Finding, ...]
    """What is odd, errors first."""
    missing: tuple[str, ...]
    """What couldn't be looked at, each with the reason."""
    columns: tuple[RowColumns, ...]
    """The files of the columns."""
    table: pd.DataFrame
    """A row for every training and evaluation row, in order: `split`, `row_id`, and the columns."""

    @property
    def files(self) -> list[str]:
        """Folders of the columns' Parquet files."""
        return [str(columns.path) for columns in self.columns]

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Return quantiles of each numeric column over all rows."""
        names = [name for name in self.table.columns if name not in NOT_SHOWN]
        values = self.table[names].astype("float64").quantile(list(QUANTILES.values()))
        return {name: dict(zip(QUANTILES, values[name].tolist(), strict=True)) for name in names}

    def as_json(self) -> dict[str, Any]:
        """Return everything but the rows, as JSON's types."""
        return {
            "prepared": str(self.prepared.path),
            "scores": str(self.scores.path) if self.scores is not None else None,
            "rows": {TRAIN: self.prepared.train_rows, EVAL: self.prepared.eval_rows},
            "findings": [finding.as_json() for finding in self.findings],
            "missing": list(self.missing),
            "columns": self.quantiles(),
            "files": self.files,
        }

    def __rich__(self) -> Group:
        rows = f"{self.prepared.train_rows:,} to train on, {self.prepared.eval_rows:,} to evaluate on"
        scores = self.scores.path if self.scores is not None else "none"
        numbers = [(name, *map(_shown, values.values())) for name, values in self.quantiles().items()]
        return Group(
            lines_of({"data": self.prepared.path, "rows": rows, "scores": scores}),
            Text(""),
            finding_lines(self.findings, NOTHING),
            *(Text(f"not looked at: {reason}", "dim") for reason in self.missing),
            Text(""),
            table_of(("column", *QUANTILES), numbers, title="columns of every row"),
            lines_of({"columns": "\n".join(self.files)}),
        )


def _shown(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"
