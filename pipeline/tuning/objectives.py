"""By what trials are compared: objectives, constraints, which trial is best, which ones no other beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import RunConfig
from pipeline.config.tuning import Bounds, TuneConfig
from pipeline.errors import ConfigError
from strategies.registry import get_strategy

__all__ = ["Measure", "Objective", "measure_of"]

GROWS = ("accuracies", "margins", "accuracy", "reward", "/chosen")
SHRINKS = ("loss", "nll_loss")
PACKING = ("sample_packing", "tokens_per_forward", "disable_dropout", "dpo_generate_during_eval", "reference", "rl")
"""Keys of methods that change no loss, or whose change is said otherwise."""


@dataclass(frozen=True)
class Objective:
    """A metric, and which way is better."""

    metric: str
    mode: Literal["max", "min"]

    def better(self, one: float, other: float) -> bool:
        """Whether `one` beats `other`."""
        return one > other if self.mode == "max" else one < other


@dataclass(frozen=True)
class Measure:
    """What a sweep optimises, and within which bounds."""

    objectives: tuple[Objective, ...]
    constraints: Mapping[str, Bounds]
    reported: tuple[str, ...]
    """What every trial's evaluations report."""

    @property
    def first(self) -> Objective:
        """The only objective, or the first of several."""
        return self.objectives[0]

    def violation(self, metrics: Mapping[str, float]) -> list[float]:
        """By how much each bound is missed; 0 or less where it holds. A metric that isn't known misses it."""
        found = []
        for name, bounds in self.constraints.items():
            value = metrics.get(name, math.nan)
            for sign, bound in ((-1, bounds.min), (1, bounds.max)):
                if bound is not None:
                    found.append(math.inf if math.isnan(value) else sign * (value - bound))
        return found

    def allows(self, metrics: Mapping[str, float]) -> bool:
        """Whether a trial with these metrics may be the best."""
        return all(amount <= 0 for amount in self.violation(metrics)) and all(
            math.isfinite(metrics.get(objective.metric, math.nan)) for objective in self.objectives
        )

    def best(self, trials: Sequence[Mapping[str, float]]) -> int | None:
        """Place of the best one by the first objective; None where none may be."""
        allowed = [place for place, metrics in enumerate(trials) if self.allows(metrics)]
        sign = 1 if self.first.mode == "max" else -1
        return max(allowed, key=lambda place: sign * trials[place][self.first.metric], default=None)

    def front(self, trials: Sequence[Mapping[str, float]]) -> list[int]:
        """Places of those that no other one beats in one objective without losing in another (Pareto front)."""
        allowed = [place for place, metrics in enumerate(trials) if self.allows(metrics)]
        return [place for place in allowed if not any(self._dominates(trials[other], trials[place]) for other in allowed)]

    def _dominates(self, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
        pairs = [(objective, one[objective.metric], other[objective.metric]) for objective in self.objectives]
        return not any(objective.better(b, a) for objective, a, b in pairs) and any(
            objective.better(a, b) for objective, a, b in pairs
        )


def measure_of(tune: TuneConfig, recipes: Sequence[RunConfig]) -> Measure:
    """What trials with these recipes are compared by.

    Raises:
        ConfigError: for a metric that isn't reported, or that can't be compared between them.
    """
    reported = _reported(recipes)
    metrics = tune.metrics or _default(recipes)
    modes = [tune.mode] * len(metrics) if tune.mode is None or isinstance(tune.mode, str) else tune.mode
    problems = [*_unknown("tune.metric", metrics, reported, recipes)]
    problems += _unknown("tune.constraints", tune.constraints, reported, recipes)
    keys = _changing_the_loss(tune, recipes)
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
        found = mode or _mode_of(metric)
        if found is None:
            problems.append(("tune.mode", f"whether {metric} is to grow or to shrink isn't plain; write max or min"))
        else:
            objectives.append(Objective(metric, found))
    if problems:
        raise ConfigError("tune", list(dict.fromkeys(problems)))
    return Measure(tuple(objectives), tune.constraints, reported)


def _reported(recipes: Sequence[RunConfig]) -> tuple[str, ...]:
    """Metrics that each of the recipes' evaluations has."""
    each = [get_strategy(cfg.rl).evaluation_metrics(cfg) for cfg in recipes]
    return tuple(name for name in each[0] if all(name in names for names in each))


def _default(recipes: Sequence[RunConfig]) -> list[str]:
    found = list(dict.fromkeys(get_strategy(cfg.rl).best_metric for cfg in recipes))
    if len(found) > 1:
        raise ConfigError("tune", [("tune.metric", f"strategies are compared whose own differ: {', '.join(found)}; name one")])
    return found


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
