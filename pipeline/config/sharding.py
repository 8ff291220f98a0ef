"""Checks of keys that are incompatible with sharding the model over the workers.

The keys of sharding belong to `cluster` and the keys they conflict with to `strategies`, so the checks are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.sharding import Sharding, precision_asked, sharding_of
from strategies.methods.registry import STRATEGIES

if TYPE_CHECKING:
    from pipeline.config.recipe import RunConfig

__all__ = ["find_problems"]

NAMES: dict[Sharding, str] = {"zero3": "ZeRO-3", "fsdp2": "FSDP2"}
"""Shardings that partition the weights themselves, not only gradients and optimizer states."""
ELEMENTWISE = ("adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
"""Optimizers with element-wise updates, which work on a shard of a weight."""


def find_problems(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield a (path, message) for every key that contradicts a valid `deepspeed` or `fsdp_config`."""
    sharding = sharding_of(cfg)
    if sharding is None:
        return
    key = "fsdp_config" if sharding == "fsdp2" else "deepspeed"
    # Alone: the other problems would be about a combination that isn't possible anyway.
    strategy = STRATEGIES.get(cfg.rl)
    if strategy is not None and (problem := strategy.sharding_problem()) is not None:
        yield key, problem
        return
    if cfg.optimizer not in ELEMENTWISE:
        yield (
            "optimizer",
            f"{cfg.optimizer} can't be used with {key}, which hands it pieces of weights; use one of {', '.join(ELEMENTWISE)}",
        )
    for name, enabled in precision_asked(cfg).items():
        # "auto" is resolved only on the workers, too late to compare it with DeepSpeed's section.
        if bool(getattr(cfg, name)) != enabled or getattr(cfg, name) == "auto":
            setting = f"{name}: {getattr(cfg, name)}".lower()
            yield (
                f"deepspeed.{name}.enabled",
                f"must agree with the recipe's `{setting}`, or be auto; got {str(enabled).lower()}",
            )
    if sharding in NAMES:
        yield from _partitioned_weight_problems(cfg, key, NAMES[sharding])


def _partitioned_weight_problems(cfg: RunConfig, key: str, name: str) -> Iterator[tuple[str, str]]:
    for quantized in ("load_in_8bit", "load_in_4bit"):
        if getattr(cfg, quantized):
            yield quantized, f"{name} does not support load_in_8bit or load_in_4bit; use `deepspeed: zero2`, or remove {key}"
    if cfg.dpo_generate_during_eval:
        yield (
            "dpo_generate_during_eval",
            f"{name} has no whole model to generate with; use `deepspeed: zero2`, or remove it",
        )
    strategy = STRATEGIES.get(cfg.rl)
    if strategy is None or strategy.reference_mode(cfg) != "live":
        return
    # With an adapter on the same base, the reference is the policy without it: no second model.
    if cfg.adapter is None or cfg.reference_model is not None:
        # A reference that is synchronised with the policy can't be cached.
        is_synchronised = cfg.trl is not None and cfg.trl.sync_ref_model
        others = ["`reference: cached`"] if "reference" in strategy.keys and not is_synchronised else []
        ways = [*others, "`deepspeed: zero2`", *(["`adapter: lora`"] if cfg.adapter is None else [])]
        yield key, f"{name} can't keep a reference model beside the policy; use {' or '.join(ways)}"
