"""What a sweep has left: its best trial, its tables, its page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.errors import RunFailed
from pipeline.notebook import html_of
from pipeline.storage import Location, inside
from pipeline.tuning.folder import REPORT, recipe_text
from pipeline.tuning.objectives import Measure
from pipeline.tuning.records import TrialRecord, table_of
from pipeline.tuning.space import trial_recipe
from pipeline.tuning.table import best_record, winners

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

__all__ = ["SweepResult", "best_recipe", "judged"]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has left."""

    run_dir: Location
    """Trials, tables, best recipe, report: a Path, or the text of a URI."""
    cfg: RunConfig
    measure: Measure
    records: list[TrialRecord] = field(repr=False)

    @property
    def best(self) -> TrialRecord | None:
        """The best trial by the first metric; None where none has evaluated, or none is within the constraints."""
        return best_record(self.records, self.measure)

    @property
    def front(self) -> list[TrialRecord]:
        """The best trial, or of several metrics those that no other one beats in all of them (Pareto front)."""
        numbers = winners(self.records, self.measure)
        return [record for record in self.records if record.number in numbers]

    @property
    def best_config(self) -> RunConfig:
        """Recipe of the best trial, ready to be trained.

        Raises:
            RunFailed: when there is no best trial.
        """
        if self.best is None:
            raise RunFailed(_no_best(self))
        return trial_recipe(self.cfg, self.best.values, str(inside(self.run_dir, "best")))

    @property
    def best_metrics(self) -> dict[str, float]:
        """Metrics of the best trial's last evaluation; empty when there is none."""
        return {} if self.best is None else self.best.metrics

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per trial: values, status, metrics of the last evaluation, cost."""
        assert self.cfg.tune is not None
        return table_of(self.records, list(self.cfg.tune.space))

    def parallel_coordinates(self) -> go.Figure:
        """Values and metrics of the trials that have evaluated, an axis each."""
        from pipeline.report.sweep import parallel_coordinates

        assert self.cfg.tune is not None
        known = [record for record in self.records if record.metrics and record.values is not None]
        return parallel_coordinates(self.cfg.tune, known, self.measure)

    @property
    def report(self) -> Location:
        """The page that shows it all."""
        return inside(self.run_dir, REPORT)

    def _repr_html_(self) -> str:
        from pipeline.tables import print_sweep

        return html_of(lambda console: print_sweep(self, console))


def judged(result: SweepResult) -> SweepResult:
    """The result, when there is a best trial.

    Raises:
        RunFailed: when there is none.
    """
    if all(record.status == "failed" for record in result.records):
        reasons = dict.fromkeys(record.reason for record in result.records)
        raise RunFailed(f"every trial has failed: {'; '.join(map(str, reasons))} (report: {result.report})")
    if result.best is None:
        raise RunFailed(f"{_no_best(result)} (report: {result.report})")
    return result


def _no_best(result: SweepResult) -> str:
    constraints = result.measure.constraints
    if constraints and any(record.metrics for record in result.records):
        bounds = ", ".join(f"{name} {bounds.model_dump(exclude_none=True)}" for name, bounds in constraints.items())
        return f"there is no best trial: none is within the constraints ({bounds})"
    return "there is no best trial: none has evaluated"


def best_recipe(result: SweepResult) -> str:
    """`best.yaml`: the best trial's recipe, and where it comes from."""
    best = result.best
    assert best is not None
    metrics = ", ".join(f"{one.metric} {best.metrics[one.metric]:.6g}" for one in result.measure.objectives)
    lines = [f"# Trial {best.name} of the sweep in {result.run_dir}: {metrics} at step {best.step} of {best.total_steps}."]
    if best.origins:
        lines.append(f"# It went on from {'; '.join(best.origins)}: one recipe doesn't lead there again.")
    return "\n".join([*lines, recipe_text(result.best_config)])
