"""From `tune.search` and `tune.scheduler` to Ray Tune's own objects."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from ray import tune as ray_tune
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.optuna import OptunaSearch

from pipeline.config.tuning import Dimension, TuneConfig
from pipeline.tuning.objectives import Measure
from pipeline.tuning.space import Values, combinations, draw, explore, extremes, grid, multiples, walk

__all__ = ["DRAW", "EVALUATION", "NEEDS_CHECKPOINTS", "Plan", "drawn_points", "plan_search", "trial_number"]

DRAW = "draw"
"""Key of Tune's config under which a trial's number and values stand."""
EVALUATION = "evaluation"
"""Time of the schedulers: evaluations that a whole run of the recipe would have had by now."""
NEEDS_CHECKPOINTS = ("hyperband", "pbt")
"""Schedulers that let trials go on from checkpoints."""
SAMPLES = 8


@dataclass(frozen=True)
class Plan:
    """Arguments of Ray's Tuner."""

    space: dict[str, Any]
    search: Any
    """A searcher, or None where all trials are known."""
    scheduler: TrialScheduler
    trials: int


def drawn_points(tune: TuneConfig, seed: int) -> list[Values] | None:
    """Values of the trials beside the baseline; None where they follow from the results of others."""
    if tune.search == "grid":
        return grid(tune)
    if tune.search == "optuna":
        return None
    chance = random.Random(seed)
    points: list[Values] = []
    for _ in range(tune.num_samples or SAMPLES):
        for _ in range(20):  # of a small space, the same would come twice
            found = list(combinations(tune, lambda key, dim: dim.values if dim.kind == "grid" else [draw(dim, chance)]))
            if not any(values in points for values in found):
                break
        points += found
    return points


def trial_number(trial_id: str, config: dict[str, Any]) -> int:
    """Number of a trial; one that took over another's values has that one's number in its config."""
    prefix, _, suffix = trial_id.rpartition("_")
    return int(suffix) if prefix else config[DRAW]["number"]


def plan_search(
    tune: TuneConfig, measure: Measure, points: list[Values] | None, evaluations: int, seed: int, own: Values | None = None
) -> Plan:
    """What Tune is asked for.

    Args:
        points: of `drawn_points`.
        evaluations: of one whole run.
        seed: of what is drawn while the sweep goes on.
        own: the recipe's own values of the searched keys.
    """
    scheduler = _scheduler(tune, measure, evaluations, own or {}, seed)
    if points is None:
        number = (tune.num_samples or SAMPLES) + tune.baseline
        return Plan({}, _optuna(tune, measure, number, seed), scheduler, number)
    values = [*([None] if tune.baseline else []), *points]
    draws = [{"number": number, "values": one} for number, one in enumerate(values)]
    return Plan({DRAW: ray_tune.grid_search(draws)}, None, scheduler, len(draws))


def _scheduler(tune: TuneConfig, measure: Measure, evaluations: int, own: Values, seed: int) -> TrialScheduler:
    common: dict[str, Any] = {"time_attr": EVALUATION, "metric": measure.first.metric, "mode": measure.first.mode}
    grace = max(1, round(tune.grace_period * evaluations))
    if tune.scheduler == "asha":
        return ASHAScheduler(**common, max_t=evaluations, grace_period=grace, reduction_factor=tune.reduction_factor)
    if tune.scheduler == "median":
        # A time slice beyond any run: it would make trials take turns, each time from their last checkpoint.
        return MedianStoppingRule(**common, grace_period=grace, min_samples_required=2, min_time_slice=10**9)
    if tune.scheduler == "hyperband":
        return HyperBandScheduler(**common, max_t=evaluations, reduction_factor=tune.reduction_factor)
    if tune.scheduler == "pbt":
        return PopulationBasedTraining(
            **common,
            perturbation_interval=tune.perturbation_interval,
            custom_explore_fn=_Explorer(tune, own, seed),
            hyperparam_mutations={},
            log_config=False,
        )
    return FIFOScheduler()


class _Explorer:
    """Values of a trial that takes over another's checkpoint."""

    def __init__(self, tune: TuneConfig, own: Values, seed: int) -> None:
        self._tune, self._own, self._chance = tune, own, random.Random(seed)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        given = config[DRAW]["values"]
        values = explore(self._tune, self._own if given is None else given, self._chance)
        return {**config, DRAW: {**config[DRAW], "values": values}}


def _optuna(tune: TuneConfig, measure: Measure, number: int, seed: int) -> OptunaSearch:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=min(10, max(4, number // 4)),
        constraints_func=_violation if measure.constraints else None,
    )
    several = len(measure.objectives) > 1
    return ConstrainedSearch(
        measure,
        space=partial(_suggest_trial, tune),
        metric=[one.metric for one in measure.objectives] if several else measure.first.metric,
        mode=[one.mode for one in measure.objectives] if several else measure.first.mode,
        sampler=sampler,
    )


class ConstrainedSearch(OptunaSearch):
    """Tune's search by Optuna, which also tells Optuna by how much a trial has missed the constraints."""

    def __init__(self, measure: Measure, **kwargs: Any) -> None:
        self._measure = measure
        super().__init__(**kwargs)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """As Tune's."""
        if result and self._measure.constraints:
            amounts = [min(amount, LARGE) for amount in self._measure.violation(result)]
            self._ot_trials[trial_id].set_user_attr(VIOLATION, amounts)
        super().on_trial_complete(trial_id, result, error)


VIOLATION = "violation"
LARGE = 1e9


def _violation(trial: optuna.trial.FrozenTrial) -> list[float]:
    return trial.user_attrs.get(VIOLATION, [LARGE])


def _suggest_trial(tune: TuneConfig, trial: Any) -> dict[str, Any]:
    """One trial's part of Tune's config; the first one is the recipe's own, of which Optuna learns nothing."""
    if tune.baseline and trial.number == 0:
        return {DRAW: {"number": 0, "values": None}}
    return {DRAW: {"number": trial.number, "values": walk(tune, partial(_suggest, tune, trial))}}


def _suggest(tune: TuneConfig, trial: Any, key: str, dimension: Dimension) -> Any:
    place = tune.space[key].index(dimension)
    return suggestion(trial, f"{key}#{place}" if place else key, dimension)


def suggestion(trial: Any, name: str, dimension: Dimension) -> Any:
    """The value that Optuna suggests; of lists it is told a text for each value."""
    if dimension.is_list:
        texts = [json.dumps(value) for value in dimension.values]
        return dimension.values[texts.index(trial.suggest_categorical(name, texts))]
    least, most = extremes(dimension)[0], extremes(dimension)[-1]
    if dimension.kind == "randint":
        return trial.suggest_int(name, least, most)
    if dimension.kind == "quniform":
        found = trial.suggest_float(name, least, most, step=dimension.values[2], log=False)
        return min(multiples(dimension), key=lambda value: abs(value - found))
    return trial.suggest_float(name, least, most, step=None, log=dimension.kind == "loguniform")
