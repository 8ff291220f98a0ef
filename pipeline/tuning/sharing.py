"""Which trials of a sweep can share one copy of the base model, and how many at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.training.sharing import MOST_SLOTS, group_by_base, why_not_shared

__all__ = ["Sharing", "check_slots", "plan_sharing", "unused_note"]

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
    largest = next(iter(group_by_base(recipes)), [])
    others = [recipe for index, recipe in enumerate(recipes) if index not in largest]
    problems = _problems(others, recipes[largest[0]] if largest else None)
    if share_base is True and (problems or not largest):
        raise ConfigError("tune", [(f"tune.share_base: true, but {key}", why) for key, why in problems])
    if len(largest) < FEWEST:
        return None
    return Sharing(recipes[largest[0]], tuple(f"{key}: {why}" for key, why in problems))


def unused_note(share_base: Any, sharing: Sharing | None) -> str | None:
    """Return a note if the recipe asks for a shared base and there is only one trial."""
    if share_base is not True or sharing is not None:
        return None
    return "tune.share_base: true, but a single trial has no other to share with: it gets workers of its own"


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
