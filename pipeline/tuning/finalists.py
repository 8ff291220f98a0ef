"""Finalists of a sweep: its best trials, repeated with other seeds, and compared by these runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from pipeline.config import RunConfig
from pipeline.tuning.objective import Objective, SweepObjective
from pipeline.tuning.records import TrialRecord

__all__ = ["Finalist", "Finals", "choose_finalists", "judge", "plan_repeats"]

CHANCE = 0.05
"""Probability with which one of two equal finalists is called better by mistake."""
SAME_COST = 0.1
"""Fraction by which the costs of runs differ that are taken to be the same."""


@dataclass(frozen=True)
class Cost:
    """A number by which runs are called cheap."""

    field: str
    """Of `TrialRecord`."""
    column: str
    """Header of tables."""
    words: str
    """What the cheapest run is the cheapest by."""


COSTS = (
    Cost("operations", "operations of a run", "by the operations of its steps"),
    Cost("worker_seconds", "worker seconds of a run's own steps", "by the time of its own steps, since operations are unknown"),
)
"""Operations first: seconds in a joint forward depend on how many rows share it."""

Verdict = Literal["best", "equal", "worse"]


@dataclass(frozen=True)
class Finalist:
    """A finalist and its runs with other seeds, without the one by which the search chose it: that favours it."""

    record: TrialRecord
    """The trial of the search."""
    runs: tuple[TrialRecord, ...]
    """Its finished repetitions."""

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [(run.values or {})["seed"] for run in self.runs]

    def cost(self, cost: Cost) -> float:
        """Return the mean cost of a run; 0 if that of a run is unknown."""
        costs = [getattr(run, cost.field) for run in self.runs]
        return statistics.fmean(costs) if all(costs) else 0.0

    def values(self, metric: str) -> list[float]:
        """Return the last value of a metric of each run; NaN where a run didn't report it."""
        return [run.metrics.get(metric, math.nan) for run in self.runs]

    def mean(self, metric: str) -> float:
        """Return the mean over the runs."""
        return statistics.fmean(self.values(metric))

    def spread(self, metric: str) -> float:
        """Return the sample standard deviation over the runs; NaN for a single one."""
        values = self.values(metric)
        return statistics.stdev(values) if len(values) > 1 else math.nan

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric that all runs report."""
        names = [name for name in self.runs[0].metrics if all(name in run.metrics for run in self.runs)]
        return {name: self.mean(name) for name in names}

    def shown(self, metric: str) -> str:
        """Format mean and spread of a metric."""
        spread = self.spread(metric)
        return f"{self.mean(metric):.4g}" + ("" if math.isnan(spread) else f" ± {spread:.2g}")


@dataclass(frozen=True)
class Finals:
    """The finalists, compared by their runs with other seeds."""

    objective: Objective
    finalists: tuple[Finalist, ...]
    """By their mean, the best one first."""
    equal: tuple[Finalist, ...]
    """Those, after the first, that are not worse than it beyond the spread of seeds."""
    cost: Cost | None
    """That of which all finalists' are known; None if there is none."""
    chosen: Finalist
    """The first, or where others are equal to it, the cheapest of them if their cost is known."""

    @property
    def word(self) -> str:
        """What the chosen one is of equal ones."""
        return "best" if self.cost is None else "cheapest"

    @property
    def cost_column(self) -> str:
        """Header of the finalists' costs."""
        return "cost of a run" if self.cost is None else self.cost.column

    def verdict(self, finalist: Finalist) -> Verdict:
        """Return `best` for the first if it is beyond the spread of seeds, `equal` for all that aren't worse beyond it."""
        if finalist not in (self.finalists[0], *self.equal):
            return "worse"
        return "equal" if self.equal else "best"

    def sentence(self) -> str:
        """Say in a sentence which finalist is taken, and why."""
        name, metric = self.chosen.record.name, self.objective.metric
        if len(self.finalists) == 1:
            return f"Trial {name} was the only finalist: {metric} {self.chosen.shown(metric)} over its seeds."
        if not self.equal:
            return f"Trial {name} is the best: its {metric} is beyond the spread of seeds."
        numbers = sorted(finalist.record.number for finalist in (self.finalists[0], *self.equal))
        listed = f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
        why = "whose mean is the best, since their cost is unknown" if self.cost is None else f"the cheapest {self.cost.words}"
        return f"Trials {listed} are equal within the spread of seeds; trial {name} is taken, {why}."


def choose_finalists(records: Sequence[TrialRecord], measure: SweepObjective, num: int) -> list[TrialRecord]:
    """Return the best finished trials that the constraints allow, best first; fewer than `num` if there are fewer."""
    allowed = [one for one in records if one.status == "finished" and one.is_candidate and measure.allows(one.metrics)]
    sign = -1 if measure.first.mode == "max" else 1
    return sorted(allowed, key=lambda one: (sign * one.metrics[measure.first.metric], one.number))[:num]


def plan_repeats(cfg: RunConfig, finalists: Sequence[TrialRecord], number: int) -> list[dict[str, Any]]:
    """Return the trials that repeat finalists: `number`, `values` and `repeats` of each.

    Args:
        cfg: the sweep's recipe.
        number: of the first one.
    """
    assert cfg.tune is not None and cfg.tune.finalists is not None
    # The same seeds for all of them, and the same evaluation rows as in the search.
    seeds = [{"seed": cfg.seed + 1 + index} for index in range(cfg.tune.finalists.seeds)]
    planned: list[dict[str, Any]] = []
    for seed in seeds:
        for finalist in finalists:
            own = finalist.values or {}
            is_split = own.get("val_set_size", cfg.val_set_size) and cfg.split_seed is None
            values = {**own, **seed, **({"split_seed": cfg.seed} if is_split else {})}
            planned.append({"number": number + len(planned), "values": values, "repeats": finalist.number})
    return planned


def judge(records: Sequence[TrialRecord], measure: SweepObjective) -> Finals | None:
    """Compare the finalists by their runs with other seeds; None where there are none that have finished.

    A finalist whose mean metrics violate the constraints doesn't count. The one with the best mean is better than another if
    the Mann-Whitney test (Annals of Mathematical Statistics 18, 1947), exact and one-sided, says so at 5 %: with three seeds
    each, if every run of the one is better than every run of the other.
    """
    objective = measure.first
    finalists = [one for one in _finalists(records) if measure.allows(one.means)]
    if not finalists:
        return None
    sign = -1 if objective.mode == "max" else 1
    first, *others = sorted(finalists, key=lambda one: (sign * one.mean(objective.metric), one.record.number))
    equal = [other for other in others if not _is_better(objective, first, other)]
    cost = next((cost for cost in COSTS if all(one.cost(cost) for one in finalists)), None)
    return Finals(objective, (first, *others), tuple(equal), cost, first if cost is None else _cheapest((first, *equal), cost))


def _cheapest(finalists: Sequence[Finalist], cost: Cost) -> Finalist:
    least = min(one.cost(cost) for one in finalists)
    # In order of their means: of those that cost the same, the best one.
    return next(one for one in finalists if one.cost(cost) <= least * (1 + SAME_COST))


def _finalists(records: Sequence[TrialRecord]) -> list[Finalist]:
    by_number = {record.number: record for record in records}
    runs: dict[int, list[TrialRecord]] = {}
    for record in records:
        if record.repeats is not None and record.status == "finished":
            runs.setdefault(record.repeats, []).append(record)
    return [Finalist(by_number[number], tuple(repeated)) for number, repeated in runs.items()]


def _is_better(objective: Objective, one: Finalist, other: Finalist) -> bool:
    ours, theirs = one.values(objective.metric), other.values(objective.metric)
    # A tie is no win, which keeps the test on the safe side.
    wins = sum(objective.better(a, b) for a in ours for b in theirs)
    m, n = len(ours), len(theirs)
    as_many = sum(_orderings(m, n, u) for u in range(wins, m * n + 1))
    return as_many / math.comb(m + n, m) <= CHANCE


@cache
def _orderings(m: int, n: int, wins: int) -> int:
    """Count the orderings of `m` and `n` values in which values of the first `m` win `wins` of the m * n comparisons."""
    if wins < 0:
        return 0
    if m == 0 or n == 0:
        return int(wins == 0)
    # The greatest value is one of the first, which wins against all others, or one of the others, which loses to none.
    return _orderings(m - 1, n, wins - n) + _orderings(m, n - 1, wins)
