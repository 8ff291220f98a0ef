"""What recipes that are run together must not have in common, and what they must."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.config import RunConfig
from pipeline.io.storage import locate

__all__ = ["ONE_RUNS", "find_problems", "names_of"]

ONE_RUNS = ("output_dir", "hub_model_id", "wandb_run_id")
"""Keys of which each run needs a value of its own."""


def names_of(recipes: Sequence[RunConfig]) -> list[str]:
    """Return names for runs: those of their folders, with the folders' parents if they wouldn't differ otherwise."""
    folders = [PurePosixPath(recipe.output_dir).name or recipe.output_dir for recipe in recipes]
    return folders if len(set(folders)) == len(folders) else [recipe.output_dir for recipe in recipes]


def find_problems(names: Sequence[str], recipes: Sequence[RunConfig]) -> Iterator[str]:
    """Yield why these recipes can't be run together, their paths being absolute."""
    for (one, recipe), (other, its) in combinations(zip(names, recipes, strict=True), 2):
        yield from _find_common_folders(one, recipe.output_dir, other, its.output_dir)
        for key in ONE_RUNS[1:]:
            value: Any = getattr(recipe, key)
            if value is not None and value == getattr(its, key):
                yield f"{key}: {one} and {other} have the same, {value!r}, which belongs to one run; give each its own, or none"
        if recipe.ray.address != its.ray.address:
            yield (
                f"ray.address: {one} has {recipe.ray.address!r} and {other} {its.ray.address!r}, and one command trains on one "
                "cluster; give all the same, or train each by a command of its own"
            )


def _find_common_folders(one: str, folder: str, other: str, its: str) -> Iterator[str]:
    here, there = _parts(folder), _parts(its)
    if here == there:
        yield f"output_dir: {one} and {other} have the same, {folder!r}; give each run a folder of its own"
    elif here == there[: len(here)]:
        yield _nested(other, its, one, folder)
    elif there == here[: len(there)]:
        yield _nested(one, folder, other, its)


def _nested(inner: str, folder: str, outer: str, around: str) -> str:
    return f"output_dir: that of {inner}, {folder!r}, is inside that of {outer}, {around!r}; give each run a folder of its own"


def _parts(folder: str) -> tuple[str, ...]:
    location = locate(folder)
    # A local folder may have two paths, by links.
    if isinstance(location, Path):
        return location.resolve().parts
    # A URI's query is about the store, not the folder.
    return PurePosixPath(location.partition("?")[0]).parts
