"""Scratch folder of a run on each node, where its workers stage uploads to storage: one checkpoint at most, or the model.

Only the workers' user can read it. Each driver chooses a random name, which can't be predicted, and no two drivers share.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from uuid import uuid4

__all__ = ["new_scratch", "open_scratch", "remove_everywhere", "remove_scratch", "scratch_of"]

PRIVATE = 0o700
REMOVE_WITHIN_S = 10.0
"""Seconds after which nodes that don't answer are given up."""


def new_scratch() -> str:
    """Return a new, random name."""
    return f"prefray-{uuid4().hex}"


def scratch_of(name: str) -> Path:
    """Return the path of a scratch folder on this node."""
    return Path(tempfile.gettempdir()) / name


def open_scratch(name: str) -> Path:
    """Create an empty scratch folder, replacing that of former workers.

    Raises:
        ValueError: when another user's file or folder has this path.
    """
    folder = scratch_of(name)
    remove_scratch(name)
    try:
        folder.mkdir(PRIVATE)
    except FileExistsError as error:
        raise ValueError(f"TMPDIR: {folder} is somebody else's; remove it, or set TMPDIR to another folder") from error
    return folder


def remove_scratch(name: str) -> None:
    """Delete a scratch folder on this node, if it exists."""
    shutil.rmtree(scratch_of(name), ignore_errors=True)


def remove_everywhere(name: str, nodes: Collection[str]) -> None:
    """Delete a scratch folder on nodes whose workers ended without doing so.

    Args:
        nodes: Ray's ids of the nodes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    elsewhere = set(nodes)
    if scratch_of(name).exists():
        remove_scratch(name)
        elsewhere.discard(ray.get_runtime_context().get_node_id())
    alive = elsewhere & {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    # No CPU: those of the node may all be taken by other runs.
    task = ray.remote(num_cpus=0, max_retries=0)(remove_scratch)
    # Not soft: on another node there is nothing to delete.
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in alive]
    removed = [task.options(scheduling_strategy=strategy).remote(name) for strategy in strategies]
    if removed:
        ray.wait(removed, num_returns=len(removed), timeout=REMOVE_WITHIN_S)
