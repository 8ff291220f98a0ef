"""Resources of workers and actors, and whether they fit a cluster; checked before anything waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ActorPlan", "WorkerPlan", "count_runs", "fit_at_once", "plan_actors", "plan_workers"]

CPUS_PER_ACTOR = 8
"""Threads beyond which one forward on a CPU hardly gets faster; further ones are better spent on another actor."""


@dataclass(frozen=True)
class WorkerPlan:
    """Workers to request from Ray: `num_workers` times `resources`, on GPUs or not."""

    num_workers: int
    use_gpu: bool
    resources: dict[str, float]
    min_workers: int | None = None
    """Fewest workers of an elastic run; None where the number is fixed."""

    @property
    def range(self) -> int | tuple[int, int]:
        """`num_workers` of Ray's ScalingConfig."""
        return self.num_workers if self.min_workers is None else (self.min_workers, self.num_workers)

    @property
    def needed(self) -> int:
        """Workers without which the run doesn't begin."""
        return self.num_workers if self.min_workers is None else self.min_workers


@dataclass(frozen=True)
class ActorPlan:
    """Actors of one stage: `num_actors` times `resources`."""

    num_actors: int
    resources: dict[str, float]

    @property
    def use_gpu(self) -> bool:
        """Whether each actor has a GPU."""
        return self.resources.get("GPU", 0) > 0


def plan_actors(
    num_actors: int | None,
    use_gpu: bool | str,
    resources: dict[str, float] | None,
    nodes: list[dict[str, float]],
    most: int,
) -> ActorPlan:
    """Decide the number of scoring actors and the resources of each, and check that they fit the cluster at once.

    By default an actor has one GPU, or, on CPUs, as many of a node's as speed up one forward: on a node of 2 CPUs one actor
    with both threads is as fast as two with one each, and holds the model once.

    Args:
        num_actors: of the config; None for as many as fit.
        use_gpu: True, False, or "auto" (where the cluster has GPUs).
        resources: resources of one actor; None for the default.
        nodes: total resources of each node.
        most: number of tasks, more actors than which would be idle.

    Raises:
        ValueError: when `num_actors`, or a single one, don't fit, with what is available and what was requested; and for
            empty resources.
    """
    total = _sum(nodes)
    each = dict(resources or {})
    if resources is None:
        gpu = total.get("GPU", 0) > 0 if use_gpu == "auto" else bool(use_gpu)
        # An actor is placed on one node, so the cluster's sum doesn't help it.
        largest = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        each = {"GPU": 1.0, "CPU": 1.0} if gpu else {"CPU": max(1.0, min(largest, CPUS_PER_ACTOR))}
    each.setdefault("CPU", 1.0)
    _check_amounts(each, "ray.score.resources_per_actor")
    wanted = min(num_actors or most, most)
    # A configured number must fit even if there are fewer tasks, so that the check doesn't depend on the data.
    placed = _count(each, nodes, num_actors or wanted)
    if placed < (num_actors or 1):
        required = num_actors or 1
        raise ValueError(
            f"ray.score.num_actors: {required} actor{'s' * (required != 1)} of {_shown(each)} each don't fit: the cluster has "
            f"{_there(each, total, nodes)}, enough for {placed}; ask for fewer actors or less for each "
            "(ray.score.resources_per_actor), or add nodes"
        )
    return ActorPlan(min(placed, wanted), each)


def plan_workers(
    num_workers: int,
    use_gpu: bool | str,
    resources: dict[str, float] | None,
    nodes: list[dict[str, float]],
    min_workers: int | None = None,
) -> WorkerPlan:
    """Decide each worker's resources and check that all workers fit the cluster at once.

    Args:
        num_workers: training workers.
        min_workers: workers of an elastic run that must fit; None where all must.
        use_gpu: True, False, or "auto" (where the cluster has GPUs).
        resources: resources of one worker, by Ray's names and in its units (memory in bytes); None for the default.
        nodes: total resources of each node.

    Raises:
        ValueError: when they don't fit, with what is available and what was requested; and for empty resources.
    """
    total = _sum(nodes)
    # Explicit resources win over `use_gpu`: Ray would give such a worker a GPU, and its trainer must use it.
    gpu = (resources or {}).get("GPU", 0) > 0 or (total.get("GPU", 0) > 0 if use_gpu == "auto" else bool(use_gpu))
    each = dict(resources or {})
    if gpu:
        each.setdefault("GPU", 1.0)
    each.setdefault("CPU", 1.0)
    _check_amounts(each, "ray.resources_per_worker")
    placed = _count(each, nodes, num_workers)
    needed = num_workers if min_workers is None else min_workers
    if placed < needed:
        raise ValueError(
            f"ray.num_workers: {needed} workers of {_shown(each)} each don't fit: the cluster has "
            f"{_there(each, total, nodes)}, enough for {placed}; ask for fewer workers or less for each "
            "(ray.resources_per_worker), or add nodes"
        )
    return WorkerPlan(num_workers, gpu, each, min_workers)


def _check_amounts(each: dict[str, float], key: str) -> None:
    """Raise ValueError for negative amounts, and for empty resources, which Ray can't schedule."""
    wrong = next((name for name, amount in each.items() if amount < 0), None)
    if wrong is not None:
        raise ValueError(f"{key}.{wrong}: must be 0 or more, got {each[wrong]:g}")
    if not any(each.values()):
        raise ValueError(
            f"{key}: {_shown(each)} is nothing that Ray could place; give a part of a CPU at least, such as CPU: 0.5"
        )


def _sum(nodes: list[dict[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _shown(each: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in each.items())


def _there(each: dict[str, float], total: dict[str, float], nodes: list[dict[str, float]]) -> str:
    have = ", ".join(f"{total.get(name, 0):g} {name}" for name in each)
    return f"{have} on {len(nodes)} node{'s' * (len(nodes) != 1)}"


def _count(each: dict[str, float], nodes: list[dict[str, float]], wanted: int) -> int:
    """Return how many of `wanted` fit at once, by first fit."""
    free = [dict(node) for node in nodes]
    return sum(_reserve(each, free) for _ in range(wanted))


def _reserve(each: dict[str, float], free: list[dict[str, float]]) -> bool:
    """Subtract one worker's resources from the first node that has them; return whether there is one."""
    for node in free:
        if all(node.get(name, 0.0) >= amount for name, amount in each.items()):
            for name, amount in each.items():
                node[name] -= amount
            return True
    return False


def count_runs(workers: WorkerPlan, nodes: list[dict[str, float]]) -> int:
    """Return how many runs with these workers fit the cluster at once."""
    free = [dict(node) for node in nodes]
    runs = 0
    # An elastic run begins with its fewest workers, so that many must fit for each of the runs.
    while all(_reserve(workers.resources, free) for _ in range(workers.needed)):
        runs += 1
    return runs


def fit_at_once(runs: Sequence[WorkerPlan], nodes: list[dict[str, float]]) -> bool:
    """Return whether runs with these workers fit the cluster at once."""
    free = [dict(node) for node in nodes]
    return all(_reserve(workers.resources, free) for workers in runs for _ in range(workers.needed))
