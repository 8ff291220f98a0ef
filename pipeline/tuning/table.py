"""Trials as a table in the terminal, while they run and at the end."""

from __future__ import annotations

from datetime import timedelta

from rich.table import Table

from pipeline.display import SHOWN
from pipeline.tuning.objectives import Measure
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import shown_value

__all__ = ["best_record", "live_table", "winners"]

STYLES = {"running": "bold", "finished": "green", "stopped": "dim", "failed": "red", "paused": "yellow", "waiting": "dim"}
WORDS = {"stopped": "ended early"}


def live_table(records: list[TrialRecord], keys: list[str], measure: Measure) -> Table:
    """A row per trial: values, status, step, metrics, time; the best ones are marked."""
    best = winners(records, measure)
    table = Table(title="trials")
    table.add_column("trial", justify="right", no_wrap=True)
    for key in keys:
        table.add_column(key, justify="right", overflow="fold")
    table.add_column("status", overflow="fold")
    table.add_column("step", justify="right", no_wrap=True)
    names = [*(one.metric for one in measure.objectives), *measure.constraints]
    for name in names:
        table.add_column(SHOWN.get(name, name), justify="right", overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("left", justify="right", no_wrap=True)
    for record in records:
        mark = "*" if record.number in best else ""
        values = ["recipe" if record.values is None else shown_value(record.values.get(key, "")) for key in keys]
        status = WORDS.get(record.status, record.status)
        status += f" (from {record.origins[-1]})" if record.origins else ""
        metrics = [shown_value(record.metrics.get(name, "")) for name in names]
        if record.metrics and not measure.allows(record.metrics):
            metrics = [f"{text} !" if name in measure.constraints else text for name, text in zip(names, metrics, strict=True)]
        steps = f"{record.step}/{record.total_steps}" if record.total_steps else ""
        left = _time(record.time_left) if record.time_left is not None else ""
        row = [f"{mark}{record.number}", *values, status, steps, *metrics, _time(record.spent), left]
        table.add_row(*row, style=STYLES[record.status])
    marked = "best" if len(measure.objectives) == 1 else "no other is better in every metric"
    table.caption = f"* {marked}" + ("; ! outside the constraints" if measure.constraints else "")
    return table


def winners(records: list[TrialRecord], measure: Measure) -> set[int]:
    """Numbers of the best trial, or of the Pareto front of several metrics.

    Of trials that have finished, where there are any: others' metrics are those of a part of a run.
    """
    compared = compared_records(records)
    metrics = [record.metrics for record in compared]
    if len(measure.objectives) > 1:
        return {compared[place].number for place in measure.front(metrics)}
    place = measure.best(metrics)
    return set() if place is None else {compared[place].number}


def compared_records(records: list[TrialRecord]) -> list[TrialRecord]:
    """The trials that can be the best one."""
    finished = [record for record in records if record.status == "finished"]
    return finished or [record for record in records if record.metrics and record.status != "failed"]


def best_record(records: list[TrialRecord], measure: Measure) -> TrialRecord | None:
    """The best trial by the first metric; None where none has evaluated, or none is within the constraints."""
    compared = compared_records(records)
    place = measure.best([record.metrics for record in compared])
    return None if place is None else compared[place]


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
