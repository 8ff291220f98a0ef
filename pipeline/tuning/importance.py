"""Hyperparameter importance by Optuna's PED-ANOVA (arXiv 2304.10255)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna

from pipeline.config.tuning import Dimension, TuneConfig
from pipeline.tuning.objective import Objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.search import suggestion
from pipeline.tuning.space import Values, build_point

__all__ = ["importances"]

FEWEST = 4
"""Trials that an importance needs."""


def importances(tune: TuneConfig, records: Sequence[TrialRecord], objective: Objective) -> dict[str, float]:
    """Return key -> importance, summing to 1; empty with too few trials, or when their metrics are all equal."""
    # The baseline's values need not lie in the space.
    # Nor do values that were chosen by hand.
    drawn = [record for record in records if record.clone_of is None and record.repeats is None]
    searched = [record for record in drawn if record.values is not None]
    evaluated = [record for record in searched if objective.metric in record.metrics]
    if len(evaluated) < FEWEST or len({record.metrics[objective.metric] for record in evaluated}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
    for record in evaluated:
        params, distributions = _as_optuna(tune, record.values or {})
        value = record.metrics[objective.metric]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importances_by_name = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    return {name: float(share) for name, share in importances_by_name.items()}


def _as_optuna(tune: TuneConfig, values: Values) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return Optuna's params and distributions of known values, by replaying `suggestion` on a recording trial."""
    recorder = RecordingTrial()
    build_point(tune, partial(_replay, recorder, values))
    return recorder.params, recorder.distributions


def _replay(recorder: RecordingTrial, values: Values, key: str, dimension: Dimension) -> Any:
    recorder.value = values[key]
    suggestion(recorder, key, dimension)
    return values[key]


class RecordingTrial:
    """Stand-in for Optuna's trial: records each suggested distribution and returns the known value."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, Any] = {}
        self.value: Any = None

    def suggest_float(self, name: str, low: float, high: float, step: float | None, log: bool) -> float:
        low, high = min(low, self.value), max(high, self.value)
        self.distributions[name] = optuna.distributions.FloatDistribution(low, high, log=log)
        self.params[name] = self.value
        return self.value

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.distributions[name] = optuna.distributions.IntDistribution(low, high)
        self.params[name] = self.value
        return self.value

    def suggest_categorical(self, name: str, texts: list[str]) -> str:
        self.distributions[name] = optuna.distributions.CategoricalDistribution(texts)
        self.params[name] = json.dumps(self.value)
        return self.params[name]
