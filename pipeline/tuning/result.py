"""Result of a sweep: its best trial, tables and report."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from rich.console import Group

from pipeline.config import RunConfig
from pipeline.errors import RunFailed
from pipeline.io.storage import Location, inside
from pipeline.tuning.coordinates import parallel_coordinates
from pipeline.tuning.finalists import Finals, judge
from pipeline.tuning.folder import REPORT, recipe_text
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.records import TrialRecord, keys_of, table_of
from pipeline.tuning.space import trial_recipe
from pipeline.tuning.table import best_record, finalists_table, trials_table, winners
from pipeline.ui.console import Printable, lines_of

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go
    from rich.table import Table

__all__ = ["SweepResult", "best_recipe", "raise_without_best"]


@dataclass(frozen=True)
class SweepResult(Printable):
    """Result of a sweep."""

    run_dir: Location
    """Folder with trials, tables, best recipe and report: a Path, or a URI string."""
    cfg: RunConfig
    measure: SweepObjective
    records: list[TrialRecord] = field(repr=False)

    @property
    def best(self) -> TrialRecord | None:
        """The best trial by the first metric; None if no trial has evaluated, or none meets the constraints."""
        return best_record(self.records, self.measure)

    @property
    def front(self) -> list[TrialRecord]:
        """The best trial, or with several metrics the Pareto front: trials that no other one dominates."""
        numbers = winners(self.records, self.measure)
        return [record for record in self.records if record.number in numbers]

    @property
    def best_config(self) -> RunConfig:
        """Recipe of the best trial, ready for `train`.

        Raises:
            RunFailed: when there is no best trial.
        """
        if self.best is None:
            raise RunFailed(_no_best(self))
        return trial_recipe(self.cfg, self.best.values, str(inside(self.run_dir, "best")))

    @property
    def best_metrics(self) -> dict[str, float]:
        """Metrics of the best trial's last evaluation, of a finalist their means over its seeds; empty without a best trial."""
        if self.finals is not None:
            return self.finals.chosen.means
        return {} if self.best is None else self.best.metrics

    @property
    def finals(self) -> Finals | None:
        """The comparison of the finalists over their seeds; None without finalists."""
        return judge(self.records, self.measure)

    @cached_property
    def table(self) -> pandas.DataFrame:
        """One row per trial: values, status, metrics of the last evaluation, cost."""
        assert self.cfg.tune is not None
        return table_of(self.records, keys_of(self.cfg.tune.space, self.records))

    def parallel_coordinates(self) -> go.Figure:
        """Plot the values and metrics of the trials that have evaluated, one axis each."""
        assert self.cfg.tune is not None
        evaluated = [record for record in self.records if record.metrics and record.is_candidate]
        searched = [record for record in evaluated if record.values is not None]
        return parallel_coordinates(self.cfg.tune, searched, self.measure)

    @property
    def report(self) -> Location:
        """The sweep's HTML report."""
        return inside(self.run_dir, REPORT)

    def __rich__(self) -> Group:
        assert self.cfg.tune is not None
        files = {
            "best": None if self.best is None else inside(self.run_dir, "best.yaml"),
            "trials": inside(self.run_dir, "trials.csv"),
            "report": self.report,
        }
        return Group(*self.tables(), lines_of(files))

    def tables(self, hosts: str = "") -> list[Table]:
        """Return the table of the trials, and that of the finalists where there are any.

        Args:
            hosts: shown below the first one, while the sweep runs.
        """
        assert self.cfg.tune is not None
        keys = keys_of(self.cfg.tune.space, self.records)
        finals = [] if self.finals is None else [finalists_table(self.finals)]
        return [trials_table(self.records, keys, self.measure, hosts), *finals]


def raise_without_best(result: SweepResult) -> SweepResult:
    """Return `result` unchanged if it has a best trial.

    Raises:
        RunFailed: when all trials failed, or there is no best trial.
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
    """Return the text of `best.yaml`: the best trial's recipe, with a comment on its origin."""
    best = result.best
    assert best is not None
    metrics = ", ".join(f"{objective.metric} {best.metrics[objective.metric]:.6g}" for objective in result.measure.objectives)
    lines = [f"# Trial {best.name} of the sweep in {result.run_dir}: {metrics} at step {best.step} of {best.total_steps}."]
    if (finals := result.finals) is not None:
        lines += _finals_lines(finals)
    if best.origins:
        lines.append(f"# It went on from {'; '.join(best.origins)}: one recipe doesn't lead there again.")
    return "\n".join([*lines, recipe_text(result.best_config)])


def _finals_lines(finals: Finals) -> list[str]:
    """Return comments for `best.yaml`: mean and spread of every finalist over its seeds, and what follows from them."""
    metric = finals.objective.metric
    lines = [f"# {finals.sentence()}", f"# {metric} over other seeds, mean and standard deviation:"]
    for one in finals.finalists:
        seeds = ", ".join(map(str, one.seeds))
        lines.append(f"#   trial {one.record.number}: {one.mean(metric):.6g}, {one.spread(metric):.3g} (seeds {seeds})")
    return lines
