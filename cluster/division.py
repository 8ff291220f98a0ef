"""How a base model that several runs share is divided among their workers, by the same keys as a model that one run trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.sharding import ShardedConfig, sharding_arguments, sharding_of

__all__ = ["divided_layers", "find_division_problems"]


def divided_layers(cfg: ShardedConfig) -> tuple[str, ...] | None:
    """Return the classes of the layers that are divided, () for those that the model names; None if nothing is divided.

    Both `deepspeed: zero3` and `fsdp_config` divide a shared base, in the same way. A custom config of either may be a file of
    the driver's node, which alone should call this.
    """
    if sharding_of(cfg) not in ("zero3", "fsdp2"):
        return None
    named = (cfg.fsdp_config.transformer_layer_cls_to_wrap if cfg.fsdp_config is not None else None) or ""
    return tuple(name.strip() for name in named.split(",") if name.strip())


def find_division_problems(cfg: ShardedConfig) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for every reason why a shared base can't be divided as a valid config says."""
    if cfg.fsdp_config is not None and cfg.fsdp_config.offload_params:
        yield "fsdp_config.offload_params", "keeps weights in host memory, from which a shared base can't be gathered"
    if cfg.fsdp_config is not None and cfg.fsdp_config.reshard_after_forward is False:
        yield "fsdp_config.reshard_after_forward", "false keeps layers whole, and a shared base frees each after its use"
    if cfg.deepspeed is not None and sharding_of(cfg) != "zero3":
        yield "deepspeed", "divides what one trial trains; what trials share can be divided by zero3, or fsdp_config"
    elif cfg.deepspeed is not None and _offloads(sharding_arguments(cfg)["deepspeed"]["zero_optimization"]):
        yield "deepspeed", "moves weights or state to host memory, for one trial alone; write zero3 without offloading"


def _offloads(zero: Mapping[str, Any]) -> bool:
    sections = (zero.get(name) or {} for name in ("offload_optimizer", "offload_param"))
    return any(section.get("device", "none") != "none" for section in sections)
