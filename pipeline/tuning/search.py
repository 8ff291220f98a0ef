"""Ray Tune's searchers and schedulers, built from `tune.search` and `tune.scheduler`."""

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

from cluster.ray_compat import optuna_trial
from pipeline.config.tuning import Dimension, TuneConfig
from pipeline.tuning.objective import SweepObjective
from pipeline.tuning.space import Values, build_point, combinations, extremes, grid, grid_of_q, perturb, sample

__all__ = [
    "CLONE",
    "EVALUATION",
    "NEEDS_CHECKPOINTS",
    "SAMPLE",
    "Plan",
    "count_trials",
    "drawn_points",
    "plan_repeats",
    "plan_search",
    "trial_number",
]

SAMPLE = "draw"
"""Key of Tune's trial config that holds the trial's number and values."""
EVALUATION = "evaluation"
"""Time attribute of the schedulers: progress through the run, in evaluations of a full run of the recipe."""
CLONE = "clone_"
"""How the ids of clones begin, which end with their numbers."""
NEEDS_CHECKPOINTS = ("hyperband", "pbt")
"""Schedulers that resume trials from checkpoints."""
SAMPLES = 8


@dataclass(frozen=True)
class Plan:
    """Arguments of Ray's Tuner."""

    space: dict[str, Any]
    search: Any
    """A searcher, or None when all trials are known in advance."""
    scheduler: TrialScheduler
    trials: int


def drawn_points(tune: TuneConfig, seed: int) -> list[Values] | None:
    """Return the values of all trials but the baseline; None if they depend on the results of earlier trials."""
    if tune.search == "grid":
        return grid(tune)
    if tune.search == "optuna":
        return None
    rng = random.Random(seed)
    points: list[Values] = []
    for _ in range(tune.num_samples or SAMPLES):
        for _ in range(20):  # sampling a small space repeats points: try again for new ones
            candidates = list(combinations(tune, lambda key, dim: dim.values if dim.kind == "grid" else [sample(dim, rng)]))
            if not any(values in points for values in candidates):
                break
        points += candidates
    return points


def trial_number(trial_id: str, config: dict[str, Any]) -> int:
    """Return a trial's number, from its id if possible: the config of a trial that exploited another has that one's number."""
    # Ids of a grid's trials end with their numbers (1f2e3_00003); those of a searcher's trials have none.
    prefix, _, suffix = trial_id.rpartition("_")
    # Those of finalists begin at 0 again, and no trial takes over their config.
    return int(suffix) if prefix and "repeats" not in config[SAMPLE] else config[SAMPLE]["number"]


def count_trials(tune: TuneConfig, points: list[Values] | None) -> int:
    """Return the number of a search's trials, the baseline included.

    Args:
        points: those of `drawn_points`.
    """
    return (len(points) if points is not None else tune.num_samples or SAMPLES) + tune.baseline


def plan_search(
    tune: TuneConfig,
    measure: SweepObjective,
    points: list[Values] | None,
    evaluations: int,
    seed: int,
    baseline_values: Values | None = None,
) -> Plan:
    """Build the arguments of Ray's Tuner.

    Args:
        points: those of `drawn_points`.
        evaluations: number of evaluations of one full run.
        seed: seed of values sampled while the sweep runs.
        baseline_values: the recipe's values of the searched keys.
    """
    scheduler = _scheduler(tune, measure, evaluations, baseline_values or {}, seed)
    if points is None:
        number = count_trials(tune, points)
        return Plan({}, _optuna(tune, measure, number, seed), scheduler, number)
    values = [*([None] if tune.baseline else []), *points]
    configs = [{"number": number, "values": point} for number, point in enumerate(values)]
    return Plan({SAMPLE: ray_tune.grid_search(configs)}, None, scheduler, len(configs))


def plan_repeats(configs: list[dict[str, Any]]) -> Plan:
    """Build the arguments of the Tuner that repeats finalists, whose trials run to their ends."""
    return Plan({SAMPLE: ray_tune.grid_search(configs)}, None, FIFOScheduler(), len(configs))


def _scheduler(
    tune: TuneConfig, measure: SweepObjective, evaluations: int, baseline_values: Values, seed: int
) -> TrialScheduler:
    # Not `training_iteration`, which begins again at 1 when a trial is restored.
    common: dict[str, Any] = {"time_attr": EVALUATION, "metric": measure.first.metric, "mode": measure.first.mode}
    grace = max(1, round(tune.grace_period * evaluations))
    if tune.scheduler == "asha":
        return ASHAScheduler(**common, max_t=evaluations, grace_period=grace, reduction_factor=tune.reduction_factor)
    if tune.scheduler == "median":
        # No time slices: they would make trials take turns, each time resuming from the last checkpoint.
        return MedianStoppingRule(**common, grace_period=grace, min_samples_required=2, min_time_slice=10**9)
    if tune.scheduler == "hyperband":
        return HyperBandScheduler(**common, max_t=evaluations, reduction_factor=tune.reduction_factor)
    if tune.scheduler == "pbt":
        return PopulationBasedTraining(
            **common,
            perturbation_interval=tune.perturbation_interval,
            custom_explore_fn=Perturb(tune, baseline_values, seed),
            # `Perturb` changes the values, which to Tune are one value, that of `SAMPLE`.
            hyperparam_mutations={},
            log_config=False,
        )
    return FIFOScheduler()


class Perturb:
    """PBT's explore function: perturbs the values of the trial whose checkpoint is taken over."""

    def __init__(self, tune: TuneConfig, baseline_values: Values, seed: int) -> None:
        self._tune, self._baseline_values, self._rng = tune, baseline_values, random.Random(seed)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        values_of_origin = config[SAMPLE]["values"]
        values = self._baseline_values if values_of_origin is None else values_of_origin
        # A clone may have changed keys that aren't searched, with which its checkpoint was trained.
        kept = {key: value for key, value in values.items() if key not in self._tune.space}
        sample = {key: value for key, value in config[SAMPLE].items() if key != "start"}  # of a clone: it has begun long ago
        return {**config, SAMPLE: {**sample, "values": {**perturb(self._tune, values, self._rng), **kept}}}


def _optuna(tune: TuneConfig, measure: SweepObjective, number: int, seed: int) -> OptunaSearch:
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
        metric=[objective.metric for objective in measure.objectives] if several else measure.first.metric,
        mode=[objective.mode for objective in measure.objectives] if several else measure.first.mode,
        sampler=sampler,
    )


class ConstrainedSearch(OptunaSearch):
    """Tune's Optuna search, which also reports constraint violations of finished trials to Optuna."""

    def __init__(self, measure: SweepObjective, **kwargs: Any) -> None:
        self._measure = measure
        super().__init__(**kwargs)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Store the violations, then complete the trial as Tune does; clones aren't Optuna's."""
        if trial_id.startswith(CLONE):
            return
        if result and self._measure.constraints:
            amounts = [min(amount, LARGE) for amount in self._measure.violation(result)]
            # Tune has no parameter for constraints; Optuna reads them when the trial is completed, in `super()`.
            optuna_trial(self, trial_id).set_user_attr(VIOLATION, amounts)
        super().on_trial_complete(trial_id, result, error)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on a result, except of a clone."""
        if not trial_id.startswith(CLONE):
            super().on_trial_result(trial_id, result)


VIOLATION = "violation"
LARGE = 1e9


def _violation(trial: optuna.trial.FrozenTrial) -> list[float]:
    # A trial without an evaluation met no constraint.
    return trial.user_attrs.get(VIOLATION, [LARGE])


def _suggest_trial(tune: TuneConfig, trial: Any) -> dict[str, Any]:
    """Suggest one trial's config; trial 0 is the baseline, whose values Optuna doesn't see."""
    if tune.baseline and trial.number == 0:
        return {SAMPLE: {"number": 0, "values": None}}
    return {SAMPLE: {"number": trial.number, "values": build_point(tune, partial(_suggest, tune, trial))}}


def _suggest(tune: TuneConfig, trial: Any, key: str, dimension: Dimension) -> Any:
    index = tune.space[key].index(dimension)
    return suggestion(trial, f"{key}#{index}" if index else key, dimension)


def suggestion(trial: Any, name: str, dimension: Dimension) -> Any:
    """Return the value that Optuna suggests. Lists are passed to it as categories in JSON text."""
    if dimension.is_list:
        # Optuna's categories are numbers, texts, bools or None; a list of modules, for example, is none of them.
        texts = [json.dumps(value) for value in dimension.values]
        return dimension.values[texts.index(trial.suggest_categorical(name, texts))]
    least, most = extremes(dimension)[0], extremes(dimension)[-1]
    if dimension.kind == "randint":
        return trial.suggest_int(name, least, most)
    if dimension.kind == "quniform":
        # Optuna's value may differ from the multiple in the last digits.
        value = trial.suggest_float(name, least, most, step=dimension.values[2], log=False)
        return min(grid_of_q(dimension), key=lambda multiple: abs(multiple - value))
    return trial.suggest_float(name, least, most, step=None, log=dimension.kind == "loguniform")
