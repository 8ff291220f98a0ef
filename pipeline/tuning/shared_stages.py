"""Stages that trials share: data preparation and reference scoring, run once before the first trial."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.config import RunConfig
from pipeline.inspection.selection import selected_count
from pipeline.planning import resolve
from pipeline.ray.session import node_resources
from pipeline.training.driver import prepare_data, score_reference
from pipeline.training.host import HostStart
from pipeline.tuning.eval_schedule import evaluations_of
from pipeline.tuning.records import Stay, TrialRecord
from pipeline.ui.display import Display
from strategies.config.optimizer import OptimizerKeys
from strategies.config.trainer import HubKeys, TrackerKeys, TrainerKeys
from strategies.methods.base import MethodKeys, PairKeys
from strategies.methods.registry import keys_of_strategies

__all__ = ["SharedStages", "SweepSavings", "prepare_shared_stages", "value_of"]

CHANGES_DATA = {"rl", "sequence_len", "seed", "reference"}
"""Training keys that affect prepared data or scores."""


def training_only() -> frozenset[str]:
    """Return the keys that affect neither prepared data nor scores."""
    groups = (OptimizerKeys, TrainerKeys, TrackerKeys, HubKeys, MethodKeys, PairKeys)
    return keys_of_strategies().union(*(group.model_fields for group in groups), {"select"}) - CHANGES_DATA


@dataclass(frozen=True)
class SharedStages:
    """Outcome of the shared stages."""

    evaluations: int
    """Evaluations of one full run of the recipe."""
    stores: int
    """Prepared data sets that trials share."""
    rows: int
    """Rows of all of them."""
    prepare_seconds: float
    score_seconds: float
    forwards: int
    """Forward passes of the reference; 0 where the scores were cached."""
    scored: bool
    """Whether any recipe uses a cached reference."""
    copies: int = 0
    """Copies of the base model that trials share; 0 where none is shared."""
    slots: int = 0
    """Trials that train at once on all of them."""
    base_bytes: int = 0
    """Of one copy: an estimate until a host has loaded it."""
    starts: int = 0
    """Times that workers of hosts have started."""
    start_seconds: float = 0.0
    """Of these starts together, until the base was loaded."""
    load_seconds: float = 0.0
    """Of these, for loading the base."""

    def summary(self) -> dict[str, Any]:
        """Return plain values for `sweep.json`."""
        return asdict(self)

    def with_starts(self, starts: Sequence[HostStart]) -> SharedStages:
        """Return these with further starts of hosts."""
        if not starts:
            return self
        return replace(
            self,
            base_bytes=starts[-1].base_bytes,
            starts=self.starts + len(starts),
            start_seconds=self.start_seconds + sum(start.seconds for start in starts),
            load_seconds=self.load_seconds + sum(start.load_seconds for start in starts),
        )


@dataclass(frozen=True)
class SweepSavings:
    """Cost of a sweep, and what sharing stages and stopping trials early has saved."""

    trials: int
    tokens: int
    steps: int
    """Steps of all trials, had each run to its end."""
    steps_left: int
    """Steps not run by trials that were stopped early."""
    seconds_per_step: float
    shared: SharedStages
    in_slots: int
    """Runs that had a slot of a host."""
    most_at_once: int
    """Of them at the same time."""
    speed: float
    """Tokens per second of all trials together while at least one was on a host or had its own workers; 0 where not known."""

    @classmethod
    def of(cls, records: Sequence[TrialRecord], shared: SharedStages) -> SweepSavings:
        """Sum up the trials that have begun."""
        started = [record for record in records if record.folder is not None]
        steps, done = sum(record.total_steps for record in started), sum(record.step for record in started)
        left = sum(max(record.total_steps - record.step, 0) for record in started if record.status == "stopped")
        tokens = sum(record.tokens for record in started)
        per_step = sum(record.seconds for record in started) / max(done, 1)
        stays = [stay for record in started for stay in record.stays]
        in_slots = [stay for stay in stays if stay.host is not None]
        seconds = seconds_of(stays)
        speed = tokens / seconds if seconds else 0.0
        return cls(len(started), tokens, steps, left, per_step, shared, len(in_slots), most_at_once(in_slots), speed)

    def sentences(self) -> list[str]:
        """Describe the savings for the report, one sentence each."""
        shared = self.shared
        stores = f"{shared.stores} prepared data set{'s' * (shared.stores != 1)} of {shared.rows:,} rows"
        sentences = [f"{self.trials} trials share {stores}, made in {shared.prepare_seconds:.1f} s."]
        if shared.scored and shared.forwards:
            again = max(self.trials / shared.stores - 1, 0) * shared.score_seconds
            sentences.append(
                f"The reference went over the rows once, {shared.forwards} forward passes in {shared.score_seconds:.1f} s; "
                f"for each trial anew it would have taken {again:.1f} s more."
            )
        elif shared.scored:
            sentences.append("The reference's log-probabilities were there already, so no trial has run it.")
        sentences += self._of_hosts()
        if self.steps_left:
            fraction = self.steps_left / self.steps
            sentences.append(
                f"Ending trials early left out {self.steps_left:,} of {self.steps:,} steps ({fraction:.0%}), at the speed of "
                f"these trials about {self.steps_left * self.seconds_per_step:.0f} s of their workers' time."
            )
        return sentences

    def _of_hosts(self) -> list[str]:
        """Describe what sharing the base has saved, by what was measured of the hosts."""
        shared = self.shared
        if not shared.copies or not self.most_at_once:
            return []
        copies = "one copy" if shared.copies == 1 else f"{shared.copies} copies"
        saved = max(self.most_at_once - shared.copies, 0) * shared.base_bytes
        sentences = [
            f"Up to {self.most_at_once} trials at once trained on {copies} of the base model ({_size(shared.base_bytes)}); "
            f"with one each they would have held {_size(saved)} more."
        ]
        if shared.starts:
            # Only what was measured: how long a trial's own workers would have taken is not known.
            started = "Workers were started once" if shared.starts == 1 else f"Workers were started {shared.starts} times"
            spared = max(self.in_slots - shared.starts, 0)
            sentences.append(
                f"{started} for {self.in_slots} runs in slots, in {shared.start_seconds / shared.starts:.1f} s "
                f"{'each' if shared.starts > 1 else 'in all'}, of which {shared.load_seconds / shared.starts:.1f} s loaded the "
                f"base; {spared} more such starts would have taken {spared * shared.start_seconds / shared.starts:.0f} s of "
                "workers' time, an estimate by these starts."
            )
        return sentences


def seconds_of(stays: Sequence[Stay]) -> float:
    """Return the seconds in which there was at least one stay."""
    seconds, until = 0.0, float("-inf")
    for stay in sorted(stays, key=lambda one: one.began):
        end = stay.ended if stay.ended is not None else time.time()
        seconds += max(0.0, end - max(stay.began, until))
        until = max(until, end)
    return seconds


def most_at_once(stays: Sequence[Stay]) -> int:
    """Return the number of stays at the same time, at most."""
    # Where one ends as another begins, the slot has passed on.
    changes = [(stay.began, 1) for stay in stays] + [(stay.ended, -1) for stay in stays if stay.ended is not None]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e7 else f"{number / 1e6:.2f} MB"


def prepare_shared_stages(cfg: RunConfig, recipes: list[RunConfig], display: Display) -> SharedStages:
    """Prepare data, and score it where the reference is cached, once per distinct data recipe among the trials.

    Args:
        cfg: the sweep's recipe.
        recipes: recipes of the trials if known in advance, else of the corners of the space.
    """
    assert cfg.tune is not None
    prepare_seconds = score_seconds = 0.0
    forwards, scored = 0, False
    stores: dict[Any, int] = {}
    evaluations: list[int] = []
    nodes = node_resources()
    for recipe in _distinct_data_recipes(cfg, recipes):
        plan = resolve(recipe, nodes)
        start = time.monotonic()
        prepared = prepare_data(plan.cfg, display)
        prepare_seconds += time.monotonic() - start
        # By path: recipes that differ in such a key may still share prepared data.
        stores[prepared.path] = prepared.train_rows + prepared.eval_rows
        rows = selected_count(plan.cfg, prepared.train_rows)
        steps, epoch = plan.total_steps(rows), plan.steps_per_epoch(rows)
        evaluations.append(evaluations_of(plan.cfg, cfg.tune.scheduler, steps, epoch))
        if plan.reference == "cached":
            start = time.monotonic()
            forwards += score_reference(plan.cfg, prepared, display).forwards
            score_seconds += time.monotonic() - start
            scored = True
    return SharedStages(evaluations[0], len(stores), sum(stores.values()), prepare_seconds, score_seconds, forwards, scored)


def _distinct_data_recipes(cfg: RunConfig, recipes: list[RunConfig]) -> list[RunConfig]:
    """One recipe per distinct combination of searched keys that affect data or scores. Continuous ranges are ignored."""
    assert cfg.tune is not None
    without = training_only()
    searched = [key for key in cfg.tune.space if not {key, key.partition(".")[0]} & without]
    ranges = {key for key in searched for dimension in cfg.tune.space[key] if not dimension.is_list}
    distinct: dict[str, RunConfig] = {}
    for recipe in recipes:
        values = {key: value_of(recipe, key) for key in searched if key not in ranges}
        distinct.setdefault(json.dumps(values, sort_keys=True, default=str), recipe)
    return list(distinct.values())


def value_of(recipe: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = recipe.model_dump(mode="json")
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else (value or {}).get(part)
    return value
