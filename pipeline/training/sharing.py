"""Which runs can share one copy of the base model, and how many of them fit the memory beside one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.division import divided_layers, find_division_problems
from pipeline.config import RunConfig
from pipeline.doctor.machine import Machine
from pipeline.doctor.memory import usable
from strategies import memory
from strategies.slots.limits import joint_tokens
from strategies.slots.rules import find_sharing_problems, unequal_keys

__all__ = ["MOST_SLOTS", "base_bytes", "fitting_slots", "group_by_base", "why_not_shared"]

MOST_SLOTS = 16
SLOT_BYTES = 64 * 2**20
"""Of a run beside its adapter's tensors: its trainer, rows' order, and what the allocator keeps."""


def why_not_shared(cfg: RunConfig, other: RunConfig | None = None) -> list[tuple[str, str]]:
    """Return (key, reason) for each reason why a run can't share a base; with `other`, the base of that one.

    Args:
        cfg: the run's recipe.
        other: recipe of a run that can.
    """
    problems = [*find_sharing_problems(cfg), *find_division_problems(cfg)]
    if cfg.is_elastic:
        problems.append(("ray.num_workers", "a range: workers that come and go would restart all runs; write a number"))
    if other is not None and not problems:
        problems += [(key, _difference(getattr(cfg, key), getattr(other, key))) for key in unequal_keys(cfg, other)]
        ours, theirs = _workers(cfg), _workers(other)
        problems += [(f"ray.{key}", _difference(ours[key], theirs[key])) for key in ours if ours[key] != theirs[key]]
    return problems


def group_by_base(recipes: Sequence[RunConfig]) -> list[list[int]]:
    """Return the indices of the recipes that can share a base, grouped by base; the largest group first."""
    groups: list[list[int]] = []
    for index, recipe in enumerate(recipes):
        if why_not_shared(recipe):
            continue
        group = next((group for group in groups if not why_not_shared(recipe, recipes[group[0]])), None)
        groups.append([index]) if group is None else group.append(index)
    return sorted(groups, key=len, reverse=True)


def fitting_slots(recipes: Iterable[RunConfig], copies: int, machine: Machine) -> int:
    """Return how many runs fit the memory with one copy of the base, by the estimate of `prefray doctor`; 0 for none.

    Args:
        recipes: of the runs, or of corners of a space; any of them may share the copy, so each run is taken to need as much
            as the most demanding one.
        copies: workers that share the machine's memory, each with a copy, or its part of one.
        machine: this one, or a GPU.
    """
    distinct = {_what_decides_memory(recipe): recipe for recipe in recipes}
    return min(_fitting(recipe, usable(machine) / copies, machine.kind == "GPU") for recipe in distinct.values())


WITHOUT_MEMORY = {
    *("seed", "split_seed", "output_dir", "tune", "lora_alpha", "gradient_accumulation_steps", "num_epochs", "max_steps"),
    *("warmup_steps", "save_steps", "eval_steps", "logging_steps"),
}
"""Keys that change nothing of what a run holds."""


def _what_decides_memory(recipe: RunConfig) -> str:
    """Return a text that is the same for recipes of which one is estimated for all."""
    values = recipe.model_dump(mode="json", exclude=WITHOUT_MEMORY)
    # Of fractions, such as learning rates, betas and dropouts, at most whether they are 0.
    return json.dumps({name: bool(one) if isinstance(one, float) else one for name, one in values.items()}, sort_keys=True)


def _fitting(recipe: RunConfig, room: float, gpu: bool) -> int:
    division = None if divided_layers(recipe) is None else memory.LAYERS
    alone = memory.estimate(recipe, recipe.num_workers, gpu, division)
    most = joint_tokens(recipe, "cuda" if gpu else "cpu")
    # Adapter and gradients; of these a copy, with which rows of a joint backward that has failed begin again.
    each = alone.gradients * (3 if most else 2) + alone.optimizer + alone.reference + alone.buckets + SLOT_BYTES
    if alone.total > room:
        return 0
    # Activations are those of one run where the others wait for their turns, and those of all rows of a joint forward.
    joint = memory.estimate(recipe, recipe.num_workers, gpu, division, most)
    full = int((room - joint.total) // each) + 1
    row, more = alone.forward.tokens, joint.forward.tokens - alone.forward.tokens
    if not more:
        return full
    # Few runs don't fill a joint forward; what it holds grows with their rows.
    few = int((room - alone.total) // (each + row * (joint.total - alone.total) / more)) + 1
    return few if few * row <= most else max(most // row, full)


def base_bytes(recipe: RunConfig) -> int:
    """Return the bytes of a run's model: the base's, and few of its adapter."""
    return memory.estimate(recipe).weights


def _difference(value: Any, other: Any) -> str:
    shown = [json.dumps(one, default=str) for one in (value, other)]
    return f"runs with {shown[0]} and {shown[1]} need different copies of the base, or different workers"


def _workers(cfg: RunConfig) -> dict[str, Any]:
    """Return what decides a run's workers, and when they count as hung."""
    return {
        "num_workers": cfg.num_workers,
        "resources_per_worker": cfg.worker_resources(),
        "use_gpu": cfg.ray.use_gpu,
        "hang_timeout": cfg.ray.hang_timeout,
    }
