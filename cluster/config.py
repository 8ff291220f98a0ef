"""Keys of where and how a run lives: workers, resources, sharding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator

from cluster import sharding
from cluster.sharding import ClusterSection, FsdpConfig

__all__ = ["ClusterKeys", "RayConfig", "ScoreConfig", "WorkerRange", "find_problems"]


SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([TGM]B)", re.IGNORECASE)
UNITS = {"TB": 10**12, "GB": 10**9, "MB": 10**6}


class _Strict(ClusterSection):
    """A section whose numbers are written as such: YAML's true would be the number 1."""

    model_config = ConfigDict(strict=True)


class ScoreConfig(_Strict):
    """The `ray.score:` section: the actors that compute the reference's log-probabilities."""

    num_actors: PositiveInt | None = Field(
        None,
        description="Actors, each with the reference in memory; when not set as many as fit, at most one per task.",
    )
    resources_per_actor: dict[str, float] | None = Field(
        None, description="Resources of each actor, such as {CPU: 4, GPU: 1}; when not set one GPU, or up to 8 CPUs of a node."
    )
    tokens_per_forward: PositiveInt | None = Field(
        None,
        description="Most tokens of one scoring forward; the run's tokens_per_forward, or twice sequence_len, when not set.",
    )

    hidden_states: bool = Field(
        False,
        description="Keep the mean last hidden state of each answer beside its log-probabilities, from which `prefray inspect` "
        "computes the column `ches`: 4 bytes x hidden size per pair (float16).",
    )

    def actor_resources(self) -> dict[str, float] | None:
        """Return the resources configured for each actor, or None for the default."""
        return _normalised(self.resources_per_actor)


class WorkerRange(_Strict):
    """`ray.num_workers` of an elastic run: as many workers as fit, from `min` to `max`."""

    min: PositiveInt = Field(1, description="Fewest workers that the run continues with.")
    max: PositiveInt = Field(description="Most workers; the global batch is always that of `max` workers.")


class RayConfig(_Strict):
    """The `ray:` section."""

    num_workers: PositiveInt | WorkerRange | None = Field(
        None,
        description="Training workers; 1 when not set. Global batch = micro batch x accumulation x workers. {min: 1, max: 4}: "
        "when workers leave or join, the run resumes from its last checkpoint at the new number, with the same global batches.",
    )
    use_gpu: bool | Literal["auto"] = Field("auto", description="One GPU per worker; `auto`: where the cluster has GPUs.")
    resources_per_worker: dict[str, float] | None = Field(
        None, description="Resources of each worker, such as {CPU: 4, GPU: 1}; one CPU, or one GPU, when not set."
    )
    max_failures: NonNegativeInt = Field(
        0, description="Restarts from the last complete checkpoint after a worker or its node failed."
    )
    hang_timeout: PositiveInt = Field(
        1800,
        description="Seconds without a heartbeat (a step, an evaluated batch, a checkpoint written) after which a worker is "
        "killed, and counts as failed.",
    )
    score: ScoreConfig = Field(default_factory=lambda: ScoreConfig(), description="Actors that score the reference.")
    address: str | None = Field(
        None, description="Address of a running cluster; without it the job's own cluster or a local one is used."
    )
    cache_dir: str | None = Field(
        None,
        description="Folder on a disk of each node, where it keeps rows and models that its workers share; when not set the "
        "node's variable PREFRAY_CACHE, or ~/.cache/prefray.",
    )
    cache_size: str | None = Field(
        None,
        description='Most that a node keeps there, such as "200GB"; what was used least recently goes first, and nothing that '
        "is in use. When not set, four fifths of what its disk has free.",
    )

    @field_validator("cache_dir")
    @classmethod
    def _check_cache_dir(cls, path: str | None) -> str | None:
        # Workers run in folders of Ray's.
        if path is not None and not path.startswith(("/", "~")):
            raise ValueError(f"must be an absolute path on the nodes' own disks, or one in ~, got {path!r}")
        return path

    @field_validator("cache_size", mode="before")
    @classmethod
    def _check_cache_size(cls, size: Any) -> Any:
        # Also for a number: one without a unit may mean bytes or GB.
        if size is not None and not ((match := SIZE.fullmatch(str(size))) and float(match[1])):
            raise ValueError(f"must be a size such as 200GB or 500MB, got {size!r}")
        return size

    @property
    def cache_bytes(self) -> int | None:
        """`cache_size` in bytes; None when not set."""
        match = SIZE.fullmatch(self.cache_size or "")
        return int(float(match[1]) * UNITS[match[2].upper()]) if match else None


class ClusterKeys(ClusterSection):
    """Top-level keys of this package."""

    ray: RayConfig = Field(default_factory=lambda: RayConfig(), description="Workers, resources and failures.")
    use_ray: bool | None = Field(None, description="Axolotl's switch; runs are always on Ray here.")
    ray_num_workers: PositiveInt | None = Field(None, description="Axolotl's name of ray.num_workers.")
    resources_per_worker: dict[str, float] | None = Field(None, description="Axolotl's name of ray.resources_per_worker.")
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="Shard the model across the workers with DeepSpeed: zero1 (optimizer state), zero2 (gradients too), zero3 "
        "(weights too), each also with `_offload` to host memory; or a JSON file, or a mapping of DeepSpeed's keys.",
    )
    fsdp_config: FsdpConfig | None = Field(
        None,
        description="Shard weights, gradients and optimizer state across the workers with FSDP2; {} for its defaults.",
    )

    @property
    def num_workers(self) -> int:
        """Training workers that the global batch is computed from; `max` of an elastic run."""
        workers = self.ray.num_workers
        return workers.max if isinstance(workers, WorkerRange) else workers or self.ray_num_workers or 1

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run can train with."""
        workers = self.ray.num_workers
        return workers.min if isinstance(workers, WorkerRange) else self.num_workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers < self.num_workers

    def worker_resources(self) -> dict[str, float] | None:
        """Return the resources configured for each worker, or None for the default."""
        return _normalised(self.ray.resources_per_worker or self.resources_per_worker)


def _normalised(resources: dict[str, float] | None) -> dict[str, float] | None:
    """Write CPU and GPU in upper case, as Ray does."""
    if resources is None:
        return None
    return {name.upper() if name.lower() in ("cpu", "gpu") else name: amount for name, amount in resources.items()}


def find_problems(cfg: ClusterKeys) -> Iterator[tuple[str, str]]:
    """Yield every (path, message) that makes the cluster's keys wrong."""
    if cfg.use_ray is False:
        yield "use_ray", "runs are always on Ray here; remove the key, or call strategies.train for one process"
    workers = cfg.ray.num_workers
    if isinstance(workers, WorkerRange) and workers.min > workers.max:
        yield "ray.num_workers", f"min ({workers.min}) is more than max ({workers.max}); swap them, or write one number"
    if cfg.ray_num_workers and cfg.ray.num_workers:
        yield "ray_num_workers", "contradicts ray.num_workers; keep one of them"
    if cfg.resources_per_worker and cfg.ray.resources_per_worker:
        yield "resources_per_worker", "contradicts ray.resources_per_worker; keep one of them"
    yield from sharding.find_problems(cfg)
