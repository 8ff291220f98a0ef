"""Terminal table of trials, while they run and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.text import Text

from pipeline.tuning.finalists import Finalist, Finals, judge
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.space import shown_value
from pipeline.ui.console import table_of
from pipeline.ui.display import SHOWN

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "best_record",
    "finalist_cells",
    "finalists_table",
    "hosts_line",
    "own_workers",
    "relation",
    "trials_table",
    "winners",
]

STYLES = {"running": "bold", "finished": "green", "stopped": "dim", "failed": "red", "paused": "yellow", "waiting": "dim"}
WORDS = {"stopped": "ended early"}


def trials_table(records: list[TrialRecord], keys: list[str], measure: SweepObjective, hosts: str = "") -> Table:
    """Return a table with one row per trial: values, status, step, metrics, time. The best ones are marked.

    Args:
        hosts: that of `hosts_line`, shown below it.
    """
    best = winners(records, measure)
    names = [*(objective.metric for objective in measure.objectives), *measure.constraints]
    hosts_column = ["host"] if any(record.stays for record in records) else []
    rows = [
        [
            Text(cell, STYLES[record.status])
            for cell in (
                *_cells(record, record.number in best, keys, names, measure),
                *[record.shown_host for _ in hosts_column],
                *_cost(record),
            )
        ]
        for record in records
    ]
    finals = judge(records, measure)
    marked = "best" if len(measure.objectives) == 1 else "no other is better in every metric"
    if finals and finals.equal:
        marked = f"the {finals.word} of those that are equal within the spread of seeds"
    return table_of(
        [
            "trial",
            *keys,
            "status",
            "step",
            *(SHOWN.get(name, name) for name in names),
            *hosts_column,
            "tokens/s",
            "time",
            "left",
        ],
        rows,
        title="trials",
        caption="\n".join(
            [
                "; ".join([f"* {marked}", *(["! outside the constraints"] if measure.constraints else [])]),
                *own_workers(records),
                *([hosts] if hosts else []),
            ]
        ),
        left=("status",),
        whole=("trial", "step", "host", "tokens/s", "time", "left"),
    )


def _cells(record: TrialRecord, is_best: bool, keys: list[str], names: list[str], measure: SweepObjective) -> list[str]:
    values = ["recipe" if record.values is None else shown_value(record.values.get(key, "")) for key in keys]
    status = WORDS.get(record.status, record.status)
    status += f" (from {record.origins[-1]})" if record.origins else ""
    status += f" ({what})" if (what := relation(record)) else ""
    steps = f"{record.step}/{record.total_steps}" if record.total_steps else ""
    metrics = [shown_value(record.metrics.get(name, "")) for name in names]
    if record.metrics and not measure.allows(record.metrics):
        metrics = [f"{text} !" if name in measure.constraints else text for name, text in zip(names, metrics, strict=True)]
    return [f"{'*' * is_best}{record.number}", *values, status, steps, *metrics]


def _cost(record: TrialRecord) -> list[str]:
    left = _time(record.time_left) if record.time_left is not None else ""
    return [f"{record.speed:,.0f}" if record.speed else "", _time(record.spent), left]


def hosts_line(records: list[TrialRecord], hosts: int, slots: int) -> str:
    """Say which trials have the slots of which hosts, and the speed of all that run.

    Args:
        hosts: that run at most.
        slots: of each.
    """
    running = [record for record in records if record.status == "running"]
    trials: dict[int, list[str]] = {}
    for record in running:
        if record.stays and (host := record.stays[-1].host) is not None:
            trials.setdefault(host, []).append(str(record.number))
    taken = sum(map(len, trials.values()))
    listed = "; ".join(f"host {host}: {_trials(numbers)}" for host, numbers in sorted(trials.items()))
    speed = sum(record.speed for record in running)
    where = f"{hosts * slots} slots on {'one copy' if hosts == 1 else f'{hosts} copies'} of the base model"
    return f"{taken} of {where} taken" + f" ({listed})" * bool(listed) + f", {speed:,.0f} tokens/s in all" * bool(speed)


def own_workers(records: Sequence[TrialRecord]) -> list[str]:
    """Say which trials had workers of their own in a sweep that shares a base, and why, a line for each reason."""
    trials: dict[str, list[str]] = {}
    for record in records:
        if record.shown_host == "own":
            trials.setdefault(record.stays[-1].why, []).append(str(record.number))
    return [f"workers of their own: {_trials(numbers)} ({why})" for why, numbers in trials.items()]


def _trials(numbers: list[str]) -> str:
    return f"trial{'s' * (len(numbers) > 1)} {', '.join(numbers)}"


def relation(record: TrialRecord) -> str:
    """Say which trial a trial repeats with another seed, or is a clone of; empty for others."""
    relations = []
    if record.repeats is not None:
        relations.append(f"trial {record.repeats}, seed {(record.values or {}).get('seed')}")
    if record.clone_of is not None:
        relations.append(f"clone of {record.clone_of}")
    return ", ".join(relations)


def finalists_table(finals: Finals) -> Table:
    """Return a table with one row per finalist: mean and spread of the metric over its runs, their cost, and the verdict."""
    metric = finals.objective.metric
    rows = [[f"{'*' * (one == finals.chosen)}{one.record.number}", *finalist_cells(finals, one)] for one in finals.finalists]
    columns = ["trial", "seeds", f"{SHOWN.get(metric, metric)}, mean ± deviation", finals.cost_column, "verdict"]
    return table_of(columns, rows, title="finalists", caption=finals.sentence(), left=("verdict",))


def finalist_cells(finals: Finals, finalist: Finalist) -> list[str]:
    """Return the seeds, mean and spread, cost and verdict of a finalist."""
    seeds = ", ".join(map(str, finalist.seeds))
    cost = "unknown" if finals.cost is None else f"{finalist.cost(finals.cost):.3g}"
    return [seeds, finalist.shown(finals.objective.metric), cost, finals.verdict(finalist)]


def winners(records: list[TrialRecord], measure: SweepObjective) -> set[int]:
    """Return the number of the best trial, or those of the Pareto front of several metrics.

    Only finished trials count, if there are any: metrics of others are those of a partial run.
    """
    if len(measure.objectives) > 1:
        compared = compared_records(records)
        return {compared[index].number for index in measure.pareto_front([record.metrics for record in compared])}
    best = best_record(records, measure)
    return set() if best is None else {best.number}


def compared_records(records: list[TrialRecord]) -> list[TrialRecord]:
    """Return the search's finished trials, or if there are none all of its trials that have evaluated and not failed."""
    records = [record for record in records if record.is_candidate]
    # A trial that was stopped early may look best by the metrics of its early steps.
    finished = [record for record in records if record.status == "finished"]
    return finished or [record for record in records if record.metrics and record.status != "failed"]


def best_record(records: list[TrialRecord], measure: SweepObjective) -> TrialRecord | None:
    """Return the best trial by the first metric; None if no trial has evaluated, or none meets the constraints.

    Where finalists were repeated with other seeds, these runs decide.
    """
    if (finals := judge(records, measure)) is not None:
        return finals.chosen.record
    compared = compared_records(records)
    index = measure.best([record.metrics for record in compared])
    return None if index is None else compared[index]


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
