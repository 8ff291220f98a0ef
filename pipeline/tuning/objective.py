"""Objectives and constraints of a sweep: the best trial, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import RunConfig
from pipeline.config.tuning import Bounds, TuneConfig
from pipeline.errors import ConfigError
from strategies.methods.registry import get_strategy

__all__ = ["Objective", "SweepObjective", "resolve_objective"]

GROWS = ("accuracies", "margins", "accuracy", "reward", "/chosen")
SHRINKS = ("loss", "nll_loss")
PACKING = ("sample_packing", "tokens_per_forward", "disable_dropout", "dpo_generate_during_eval", "reference", "rl")
"""Keys of methods that don't change the loss, or that `_changing_the_loss` covers otherwise."""


@dataclass(frozen=True)
class Objective:
    """A metric and the direction in which it is optimised."""

    metric: str
    mode: Literal["max", "min"]

    def better(self, one: float, other: float) -> bool:
        """Return whether `one` is better than `other`."""
        return one > other if self.mode == "max" else one < other


@dataclass(frozen=True)
class SweepObjective:
    """Objectives that a sweep optimises, and constraints on its metrics."""

    objectives: tuple[Objective, ...]
    constraints: Mapping[str, Bounds]
    reported: tuple[str, ...]
    """Metrics that the evaluations of every trial report."""

    @property
    def first(self) -> Objective:
        """The first objective, by which schedulers compare trials."""
        return self.objectives[0]

    def violation(self, metrics: Mapping[str, float]) -> list[float]:
        """Return the violation of each bound, 0 or less where it holds; infinite for a missing metric."""
        violations = []
        for name, bounds in self.constraints.items():
            value = metrics.get(name, math.nan)
            for sign, bound in ((-1, bounds.min), (1, bounds.max)):
                if bound is not None:
                    # Optuna's constraints hold where the value is 0 or less.
                    violations.append(math.inf if math.isnan(value) else sign * (value - bound))
        return violations

    def allows(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the constraints hold and all objectives are finite."""
        return all(amount <= 0 for amount in self.violation(metrics)) and all(
            math.isfinite(metrics.get(objective.metric, math.nan)) for objective in self.objectives
        )

    def best(self, trials: Sequence[Mapping[str, float]]) -> int | None:
        """Return the index of the best trial by the first objective; None if no trial is allowed."""
        allowed = [index for index, metrics in enumerate(trials) if self.allows(metrics)]
        sign = 1 if self.first.mode == "max" else -1
        return max(allowed, key=lambda index: sign * trials[index][self.first.metric], default=None)

    def pareto_front(self, trials: Sequence[Mapping[str, float]]) -> list[int]:
        """Return the indices of the allowed trials that no other one dominates."""
        allowed = [index for index, metrics in enumerate(trials) if self.allows(metrics)]
        return [index for index in allowed if not any(self._dominates(trials[other], trials[index]) for other in allowed)]

    def _dominates(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        pairs = [(objective, one[objective.metric], other[objective.metric]) for objective in self.objectives]
        # At least as good in all metrics, and better in one.
        return not any(objective.better(b, a) for objective, a, b in pairs) and any(
            objective.better(a, b) for objective, a, b in pairs
        )


def resolve_objective(tune: TuneConfig, recipes: Sequence[RunConfig]) -> SweepObjective:
    """Resolve the `tune` section's metrics, modes and constraints for trials with these recipes.

    Raises:
        ConfigError: for a metric that isn't reported, or that can't be compared between the recipes.
    """
    reported = _reported(recipes)
    metrics = tune.metrics or _default(recipes)
    modes = [tune.mode] * len(metrics) if tune.mode is None or isinstance(tune.mode, str) else tune.mode
    problems = [*_unknown("tune.metric", metrics, reported, recipes)]
    problems += _unknown("tune.constraints", tune.constraints, reported, recipes)
    keys = _changing_the_loss(tune, recipes)
    # Margins grow with beta, so trials with other betas can't be compared by them.
    scaled = [key for key in keys if key in ("rl", "rl_beta", "trl.beta")]
    if not tune.metrics and metrics[0].endswith("margins") and scaled:
        problems.append(
            (
                "tune.metric",
                f"{metrics[0]}, the strategy's own, grows with beta, and {', '.join(scaled)} is searched; name a metric "
                "(the same one, if that is what you want)",
            )
        )
    if any(name.endswith("loss") for name in (*metrics, *tune.constraints)) and keys:
        problems.append(
            (
                "tune.metric",
                f"losses can't be compared where {', '.join(keys)} differs: each value makes another loss of the same model; "
                f"use {', '.join(dict.fromkeys(get_strategy(cfg.rl).best_metric for cfg in recipes))}",
            )
        )
    objectives = []
    for metric, mode in zip(metrics, modes, strict=True):
        resolved = mode or _mode_of(metric)
        if resolved is None:
            problems.append(("tune.mode", f"whether {metric} is to grow or to shrink isn't plain; write max or min"))
        else:
            objectives.append(Objective(metric, resolved))
    if problems:
        raise ConfigError("tune", list(dict.fromkeys(problems)))
    return SweepObjective(tuple(objectives), tune.constraints, reported)


def _reported(recipes: Sequence[RunConfig]) -> tuple[str, ...]:
    """Return the metrics that the evaluations of all recipes report."""
    each = [get_strategy(cfg.rl).evaluation_metrics(cfg) for cfg in recipes]
    return tuple(name for name in each[0] if all(name in names for names in each))


def _default(recipes: Sequence[RunConfig]) -> list[str]:
    defaults = list(dict.fromkeys(get_strategy(cfg.rl).best_metric for cfg in recipes))
    if len(defaults) > 1:
        raise ConfigError(
            "tune", [("tune.metric", f"strategies are compared whose own differ: {', '.join(defaults)}; name one")]
        )
    return defaults


def _unknown(
    path: str, names: Iterable[str], reported: Sequence[str], recipes: Sequence[RunConfig]
) -> Iterator[tuple[str, str]]:
    strategies = ", ".join(dict.fromkeys(cfg.rl for cfg in recipes))
    for name in names:
        if name not in reported:
            more = ""
            if name == "eval_answer_length":
                more = "; eval_answer_length needs dpo_generate_during_eval: true"
            yield path, f"{name!r} is not reported by evaluations of rl: {strategies}; these are: {', '.join(reported)}{more}"


def _changing_the_loss(tune: TuneConfig, recipes: Sequence[RunConfig]) -> list[str]:
    keys = set().union(*(get_strategy(cfg.rl).keys for cfg in recipes)) - set(PACKING)
    return [key for key in tune.space if key in keys or key == "rl"]


def _mode_of(metric: str) -> Literal["max", "min"] | None:
    if metric.endswith(SHRINKS):
        return "min"
    return "max" if metric.endswith(GROWS) else None
