"""What trials have in common: prepared data and the reference's log-probabilities, made once before the first of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.display import Display
from pipeline.session import node_resources
from pipeline.tuning.cadence import evaluations_of
from pipeline.tuning.records import TrialRecord
from strategies.base import MethodKeys, PairKeys
from strategies.config.optimizer import OptimizerKeys
from strategies.config.trainer import HubKeys, TrackerKeys, TrainerKeys
from strategies.registry import get_strategy, keys_of_strategies

__all__ = ["Saved", "Shared", "share", "value_of"]

CHANGES_DATA = {"rl", "sequence_len", "seed", "reference"}
"""Keys of training that decide what is prepared or scored."""


def training_only() -> frozenset[str]:
    """Keys that change neither."""
    groups = (OptimizerKeys, TrainerKeys, TrackerKeys, HubKeys, MethodKeys, PairKeys)
    return keys_of_strategies().union(*(group.model_fields for group in groups)) - CHANGES_DATA


@dataclass(frozen=True)
class Shared:
    """What was made before the first trial."""

    evaluations: int
    """Of one whole run of the recipe."""
    stores: int
    """Prepared data sets that trials share."""
    rows: int
    """Rows of all of them."""
    prepare_seconds: float
    score_seconds: float
    forwards: int
    """Forward passes of the reference; 0 where the scores were there already."""
    scored: bool
    """Whether there is a cached reference at all."""

    def summary(self) -> dict[str, Any]:
        """As plain values, for `sweep.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Saved:
    """What a sweep has cost, and what it has not, since trials share data and end early."""

    trials: int
    tokens: int
    steps: int
    """Of all trials, had each run to its end."""
    steps_left: int
    """Of those that ended early."""
    seconds_per_step: float
    shared: Shared

    @classmethod
    def of(cls, records: Sequence[TrialRecord], shared: Shared) -> Saved:
        """Of the trials that have begun."""
        begun = [record for record in records if record.folder is not None]
        steps, taken = sum(one.total_steps for one in begun), sum(one.step for one in begun)
        left = sum(max(one.total_steps - one.step, 0) for one in begun if one.status == "stopped")
        tokens = sum(one.tokens for one in begun)
        return cls(len(begun), tokens, steps, left, sum(one.seconds for one in begun) / max(taken, 1), shared)

    def sentences(self) -> list[str]:
        """In words."""
        shared = self.shared
        stores = f"{shared.stores} prepared data set{'s' * (shared.stores != 1)} of {shared.rows:,} rows"
        found = [f"{self.trials} trials share {stores}, made in {shared.prepare_seconds:.1f} s."]
        if shared.scored and shared.forwards:
            again = max(self.trials / shared.stores - 1, 0) * shared.score_seconds
            found.append(
                f"The reference went over the rows once, {shared.forwards} forward passes in {shared.score_seconds:.1f} s; "
                f"for each trial anew it would have taken {again:.1f} s more."
            )
        elif shared.scored:
            found.append("The reference's log-probabilities were there already, so no trial has run it.")
        if self.steps_left:
            share = self.steps_left / self.steps
            found.append(
                f"Ending trials early left out {self.steps_left:,} of {self.steps:,} steps ({share:.0%}), at the speed of "
                f"these trials about {self.steps_left * self.seconds_per_step:.0f} s of their workers' time."
            )
        return found


def share(cfg: RunConfig, recipes: list[RunConfig], display: Display) -> Shared:
    """Prepare, and score where the reference is cached, once for each kind of data among the trials.

    Args:
        cfg: the sweep's recipe.
        recipes: of the trials that are known; where they follow from results, of the corners of the space.
    """
    from pipeline.reference import settle
    from pipeline.training.driver import plan_run, prepare_data, score_reference
    from strategies.cadence import steps_per_epoch, total_steps

    assert cfg.tune is not None
    prepare_seconds = score_seconds = 0.0
    forwards, scored = 0, False
    stores: dict[Any, int] = {}
    evaluations: list[int] = []
    nodes = node_resources()
    for recipe in _kinds(cfg, recipes):
        workers = plan_run(recipe, nodes)
        recipe = settle(recipe) if recipe.bf16 == "auto" and not workers.use_gpu else recipe
        began = time.monotonic()
        prepared = prepare_data(recipe, display)
        prepare_seconds += time.monotonic() - began
        stores[prepared.path] = prepared.train_rows + prepared.eval_rows
        steps = total_steps(prepared.train_rows, recipe, workers.num_workers)
        epoch = steps_per_epoch(prepared.train_rows, recipe, workers.num_workers)
        evaluations.append(evaluations_of(recipe, cfg.tune.scheduler, steps, epoch))
        if get_strategy(recipe.rl).reference_mode(recipe) == "cached":
            began = time.monotonic()
            forwards += score_reference(recipe, prepared, display).forwards
            score_seconds += time.monotonic() - began
            scored = True
    return Shared(evaluations[0], len(stores), sum(stores.values()), prepare_seconds, score_seconds, forwards, scored)


def _kinds(cfg: RunConfig, recipes: list[RunConfig]) -> list[RunConfig]:
    """One recipe for each combination of values that decide the data; values of ranges are left to the trials."""
    assert cfg.tune is not None
    without = training_only()
    searched = [key for key in cfg.tune.space if not {key, key.partition(".")[0]} & without]
    ranges = {key for key in searched for one in cfg.tune.space[key] if not one.is_list}
    found: dict[str, RunConfig] = {}
    for recipe in recipes:
        values = {key: value_of(recipe, key) for key in searched if key not in ranges}
        found.setdefault(json.dumps(values, sort_keys=True, default=str), recipe)
    return list(found.values())


def value_of(recipe: RunConfig, key: str) -> Any:
    """A key's value, by its dotted path."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    return value
