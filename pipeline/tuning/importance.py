"""How much each searched key matters, by Optuna's PED-ANOVA (arXiv 2304.10255)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna

from pipeline.config.tuning import Dimension, TuneConfig
from pipeline.tuning.objectives import Objective
from pipeline.tuning.records import TrialRecord
from pipeline.tuning.searching import suggestion
from pipeline.tuning.space import Values, walk

__all__ = ["importances"]

FEWEST = 4
"""Trials below which nothing can be said."""


def importances(tune: TuneConfig, records: Sequence[TrialRecord], objective: Objective) -> dict[str, float]:
    """Key -> its share, which add up to 1; empty where there are too few trials, or they don't differ."""
    known = [record for record in records if record.values is not None and objective.metric in record.metrics]
    if len(known) < FEWEST or len({record.metrics[objective.metric] for record in known}) < 2:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize" if objective.mode == "max" else "minimize")
    for record in known:
        params, distributions = _as_optuna(tune, record.values or {})
        value = record.metrics[objective.metric]
        study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in found.items()}


def _as_optuna(tune: TuneConfig, values: Values) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and distributions as Optuna has them, found by letting it suggest the values that are given."""
    noted = _Noting()
    walk(tune, partial(_note, noted, values))
    return noted.params, noted.distributions


def _note(noted: _Noting, values: Values, key: str, dimension: Dimension) -> Any:
    noted.value = values[key]
    suggestion(noted, key, dimension)
    return values[key]


class _Noting:
    """Stands in for Optuna's trial: notes what it is asked for, and answers with the value that is known."""

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
