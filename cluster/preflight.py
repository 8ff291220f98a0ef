"""Whether a cluster can hold a run, said before anything waits for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WorkerPlan", "plan_workers"]


@dataclass(frozen=True)
class WorkerPlan:
    """What Ray is asked for: `num_workers` times `resources`, on GPUs or not."""

    num_workers: int
    use_gpu: bool
    resources: dict[str, float]


def plan_workers(
    num_workers: int,
    use_gpu: bool | str,
    resources: dict[str, float] | None,
    nodes: list[dict[str, float]],
) -> WorkerPlan:
    """Decide each worker's resources and check that all workers fit the cluster at once.

    Args:
        num_workers: training workers.
        use_gpu: True, False, or "auto" (where the cluster has GPUs).
        resources: resources of one worker, where the config says.
        nodes: total resources of each node.

    Raises:
        ValueError: when they don't fit, with what is there and what was asked.
    """
    total: dict[str, float] = {}
    for node in nodes:
        for name, amount in node.items():
            total[name] = total.get(name, 0.0) + amount
    gpu = (resources or {}).get("GPU", 0) > 0 or (total.get("GPU", 0) > 0 if use_gpu == "auto" else bool(use_gpu))
    each = dict(resources or {})
    if gpu:
        each.setdefault("GPU", 1.0)
    each.setdefault("CPU", 1.0)
    free = [dict(node) for node in nodes]
    placed = sum(_place(each, free) for _ in range(num_workers))
    if placed < num_workers:
        asked = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
        there = ", ".join(f"{total.get(name, 0):g} {name}" for name in each)
        raise ValueError(
            f"ray.num_workers: {num_workers} workers of {asked} each don't fit: the cluster has {there} on "
            f"{len(nodes)} node{'s' * (len(nodes) != 1)}, enough for {placed}; ask for fewer workers or less for each "
            "(ray.resources_per_worker), or add nodes"
        )
    return WorkerPlan(num_workers, gpu, each)


def _place(each: dict[str, float], free: list[dict[str, float]]) -> bool:
    """Take one worker's resources from the first node that has them."""
    for node in free:
        if all(node.get(name, 0.0) >= amount for name, amount in each.items()):
            for name, amount in each.items():
                node[name] -= amount
            return True
    return False
