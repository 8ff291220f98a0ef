"""Which trials of a sweep can share one copy of the base model, and how many at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.division import divided_layers, find_division_problems
from pipeline.config import RunConfig
from pipeline.doctor.machine import Machine
from pipeline.doctor.memory import usable
from pipeline.errors import ConfigError, UserError
from strategies import memory
from strategies.slots.rules import find_sharing_problems, unequal_keys

__all__ = ["Sharing", "base_bytes", "check_slots", "fitting_slots", "plan_sharing", "why_not_shared"]

MOST_SLOTS = 16
SLOT_BYTES = 64 * 2**20
"""Of a trial beside its adapter's tensors: its trainer, rows' order, and what the allocator keeps."""
FEWEST = 2
"""Trials that sharing is worth it for."""


@dataclass(frozen=True)
class Sharing:
    """What the trials of a sweep share."""

    recipe: RunConfig
    """A trial's, whose base and workers all that share have."""
    reasons: tuple[str, ...] = ()
    """Why other trials can't, each reason once."""
    hosts: int = 1
    """Copies of the base at once, each with workers of its own."""
    slots: int = 1
    """Trials that each takes at once."""


def why_not_shared(cfg: RunConfig, other: RunConfig | None = None) -> list[tuple[str, str]]:
    """Return (key, reason) for each reason why a trial can't share a base; with `other`, the base of that one.

    Args:
        cfg: the trial's recipe.
        other: recipe of a trial that can.
    """
    problems = [*find_sharing_problems(cfg), *find_division_problems(cfg)]
    if cfg.is_elastic:
        problems.append(("ray.num_workers", "a range: workers that come and go would restart all trials; write a number"))
    if other is not None and not problems:
        problems += [(key, _difference(getattr(cfg, key), getattr(other, key))) for key in unequal_keys(cfg, other)]
        ours, theirs = _workers(cfg), _workers(other)
        problems += [(f"ray.{key}", _difference(ours[key], theirs[key])) for key in ours if ours[key] != theirs[key]]
    return problems


def plan_sharing(share_base: Any, recipes: Sequence[RunConfig]) -> Sharing | None:
    """Decide which base the trials of a sweep share: the one that most of them can; None where nothing is shared.

    Args:
        share_base: `tune.share_base`.
        recipes: of the trials where these are known, else of corners of the space.

    Raises:
        ConfigError: with `true`, for trials that can't, naming the keys.
    """
    if share_base is False or not recipes:
        return None
    able = [recipe for recipe in recipes if not why_not_shared(recipe)]
    groups: list[list[RunConfig]] = []
    for recipe in able:
        group = next((group for group in groups if not why_not_shared(recipe, group[0])), None)
        groups.append([recipe]) if group is None else group.append(recipe)
    largest = max(groups, key=len, default=[])
    others = [recipe for recipe in recipes if not any(recipe is one for one in largest)]
    problems = _problems(others, largest[0] if largest else None)
    if share_base is True and (problems or not largest):
        raise ConfigError("tune", [(f"tune.share_base: true, but {key}", why) for key, why in problems])
    if len(largest) < FEWEST:
        return None
    return Sharing(largest[0], tuple(f"{key}: {why}" for key, why in problems))


def fitting_slots(recipe: RunConfig, copies: int, machine: Machine) -> int:
    """Return how many trials fit the memory with one copy of the base, by the estimate of `prefray doctor`; 0 for none.

    Args:
        recipe: of one of the trials.
        copies: workers that share the machine's memory, each with a copy, or its part of one.
        machine: this one, or a GPU.
    """
    division = None if divided_layers(recipe) is None else memory.LAYERS
    found = memory.estimate(recipe, recipe.num_workers, machine.kind == "GPU", division)
    # Activations are those of one trial: the others wait for their turns.
    each = found.gradients * 2 + found.optimizer + found.reference + found.buckets + SLOT_BYTES
    return max(0, int((usable(machine) / copies - found.total) // each) + 1)


def base_bytes(recipe: RunConfig) -> int:
    """Return the bytes of a trial's model: the base's, and few of its adapter."""
    return memory.estimate(recipe).weights


def check_slots(wanted: int | None, fitting: int, trials: int) -> int:
    """Return the slots of a host.

    Args:
        wanted: `tune.slots`.
        fitting: those of `fitting_slots`.
        trials: of each host.

    Raises:
        UserError: when more are wanted than fit.
    """
    if wanted is not None and wanted > fitting:
        raise UserError(
            f"tune.slots: {wanted} trials don't fit the memory beside one copy of the base: {fitting} do; lower it, or "
            "leave it out"
        )
    return wanted or max(1, min(fitting, MOST_SLOTS, trials))


def _problems(recipes: Iterable[RunConfig], other: RunConfig | None) -> list[tuple[str, str]]:
    return list(dict.fromkeys(problem for recipe in recipes for problem in why_not_shared(recipe, other)))


def _difference(value: Any, other: Any) -> str:
    shown = [json.dumps(one, default=str) for one in (value, other)]
    return f"trials with {shown[0]} and {shown[1]} need different copies of the base, or different workers"


def _workers(cfg: RunConfig) -> dict[str, Any]:
    """Return what decides a run's workers."""
    return {"num_workers": cfg.num_workers, "resources_per_worker": cfg.worker_resources(), "use_gpu": cfg.ray.use_gpu}
