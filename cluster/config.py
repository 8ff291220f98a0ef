"""Keys of where and how a run lives: workers, resources, sharding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from cluster import sharding

__all__ = ["ClusterKeys", "FsdpConfig", "RayConfig", "ScoreConfig", "WorkerRange", "find_problems"]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreConfig(_Keys):
    """The `ray.score:` section: the actors that compute the reference's log-probabilities."""

    num_actors: PositiveInt | None = Field(
        None,
        description="Actors, each with the reference in memory; when not set as many as fit, and no more than there is work.",
    )
    resources_per_actor: dict[str, float] | None = Field(
        None, description="Resources of each actor, such as {CPU: 4, GPU: 1}; when not set one GPU, or up to 8 CPUs of a node."
    )
    tokens_per_forward: PositiveInt | None = Field(
        None,
        description="Most tokens of one scoring forward; the run's tokens_per_forward, or twice sequence_len, when not set.",
    )

    def actor_resources(self) -> dict[str, float] | None:
        """Resources that the config asks for each actor, or None where it doesn't say."""
        return _normalised(self.resources_per_actor)


class WorkerRange(_Keys):
    """`ray.num_workers` of an elastic run: as many workers as there is room for, from `min` to `max`."""

    min: PositiveInt = Field(1, description="Fewest workers that the run goes on with.")
    max: PositiveInt = Field(description="Most workers; the global batch is that of so many, however many there are.")


class RayConfig(_Keys):
    """The `ray:` section."""

    num_workers: PositiveInt | WorkerRange | None = Field(
        None,
        description="Training workers; 1 when not set. Global batch = micro batch x accumulation x workers. {min: 1, max: 4}: "
        "when workers leave or come the run goes on from its last checkpoint at the new number, with the same global batches.",
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
        description="Seconds without a sign of life (a step, an evaluated batch, a checkpoint written) after which a worker is "
        "killed, and counts as failed.",
    )
    score: ScoreConfig = Field(default_factory=lambda: ScoreConfig(), description="Actors that score the reference.")
    address: str | None = Field(
        None, description="Address of a running cluster; without it the job's own cluster or a local one is used."
    )


class FsdpConfig(_Keys):
    """The `fsdp_config:` section, by Axolotl's keys."""

    fsdp_version: int = Field(2, description="2; version 1 is not supported.")
    activation_checkpointing: bool | None = Field(None, description="Recompute activations of wrapped layers.")
    offload_params: bool | None = Field(None, description="Keep parameters and gradients in host memory.")
    cpu_ram_efficient_loading: bool | None = Field(None, description="Only rank 0 loads the weights.")
    cpu_offload_pin_memory: bool | None = Field(None, description="Pin host memory for offloading.")
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = Field(None, description="Checkpoints.")
    final_state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = Field(None, description="Result.")
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"] | None = Field(None, description="Wrapping.")
    transformer_layer_cls_to_wrap: str | None = Field(None, description="Layer class that is wrapped.")
    min_num_params: PositiveInt | None = Field(None, description="Smallest module that SIZE_BASED_WRAP wraps.")
    reshard_after_forward: bool | None = Field(None, description="Free gathered parameters after the forward.")
    mixed_precision_policy: str | None = Field(None, description="Precision of parameters and reductions.")


class ClusterKeys(_Keys):
    """Top-level keys that this package owns."""

    ray: RayConfig = Field(default_factory=lambda: RayConfig(), description="Workers, resources and failures.")
    use_ray: bool | None = Field(None, description="Axolotl's switch; runs are always on Ray here.")
    ray_num_workers: PositiveInt | None = Field(None, description="Axolotl's name of ray.num_workers.")
    resources_per_worker: dict[str, float] | None = Field(None, description="Axolotl's name of ray.resources_per_worker.")
    deepspeed: str | dict[str, Any] | None = Field(
        None,
        description="Divide the model among the workers by DeepSpeed: zero1 (optimizer state), zero2 (gradients too), zero3 "
        "(weights too), each also with `_offload` to host memory; or a JSON file, or a mapping of DeepSpeed's keys.",
    )
    fsdp_config: FsdpConfig | None = Field(
        None,
        description="Divide weights, gradients and optimizer state among the workers by FSDP2; {} for its defaults.",
    )

    @property
    def num_workers(self) -> int:
        """Training workers of this run, of an elastic one the most: those that the global batch counts."""
        given = self.ray.num_workers
        return given.max if isinstance(given, WorkerRange) else given or self.ray_num_workers or 1

    @property
    def min_workers(self) -> int:
        """Workers that the run needs at least."""
        given = self.ray.num_workers
        return given.min if isinstance(given, WorkerRange) else self.num_workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during the run."""
        return self.min_workers < self.num_workers

    def worker_resources(self) -> dict[str, float] | None:
        """Resources that the config asks for each worker, or None where it doesn't say."""
        return _normalised(self.ray.resources_per_worker or self.resources_per_worker)


def _normalised(resources: dict[str, float] | None) -> dict[str, float] | None:
    """CPU and GPU as Ray writes them."""
    if resources is None:
        return None
    return {name.upper() if name.lower() in ("cpu", "gpu") else name: amount for name, amount in resources.items()}


def find_problems(cfg: ClusterKeys) -> Iterator[tuple[str, str]]:
    """Yield every (path, message) that makes the cluster's keys wrong."""
    if cfg.use_ray is False:
        yield "use_ray", "runs are always on Ray here; remove the key, or call strategies.train for one process"
    given = cfg.ray.num_workers
    if isinstance(given, WorkerRange) and given.min > given.max:
        yield "ray.num_workers", f"min ({given.min}) is more than max ({given.max}); swap them, or write one number"
    if cfg.ray_num_workers and cfg.ray.num_workers:
        yield "ray_num_workers", "contradicts ray.num_workers; keep one of them"
    if cfg.resources_per_worker and cfg.ray.resources_per_worker:
        yield "resources_per_worker", "contradicts ray.resources_per_worker; keep one of them"
    yield from sharding.find_problems(cfg)
