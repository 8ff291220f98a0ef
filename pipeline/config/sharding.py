"""What of a recipe doesn't go together with dividing its model among the workers.

The keys of sharding are `cluster`'s and what they are combined with is `strategies`', so the rules stand here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.sharding import Sharding, precision_asked, sharding_of
from strategies.registry import STRATEGIES

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["find_problems"]

NAMES: dict[Sharding, str] = {"zero3": "ZeRO-3", "fsdp2": "FSDP2"}
"""Those that divide the weights themselves."""
ELEMENTWISE = ("adagrad", "adamw_torch", "adamw_torch_fused", "rmsprop", "sgd")
"""Optimizers that treat each number of a weight for itself, so that they don't mind seeing a piece of it."""


def find_problems(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for keys that contradict `deepspeed` or `fsdp_config`, which are right in themselves."""
    sharding = sharding_of(cfg)
    if sharding is None:
        return
    key = "fsdp_config" if sharding == "fsdp2" else "deepspeed"
    if cfg.rl == "grpo":
        yield key, "doesn't go with rl: grpo, which generates with whole models; remove it to train under DDP"
        return
    if cfg.optimizer not in ELEMENTWISE:
        yield (
            "optimizer",
            f"{cfg.optimizer} can't be used with {key}, which hands it pieces of weights; use one of {', '.join(ELEMENTWISE)}",
        )
    for name, enabled in precision_asked(cfg).items():
        if bool(getattr(cfg, name)) != enabled or getattr(cfg, name) == "auto":
            said = f"{name}: {getattr(cfg, name)}".lower()
            yield f"deepspeed.{name}.enabled", f"must agree with the recipe's `{said}`, or be auto; got {str(enabled).lower()}"
    if sharding in NAMES:
        yield from _of_divided_weights(cfg, key, NAMES[sharding])


def _of_divided_weights(cfg: RunConfig, key: str, name: str) -> Iterator[tuple[str, str]]:
    for quantized in ("load_in_8bit", "load_in_4bit"):
        if getattr(cfg, quantized):
            yield quantized, f"{name} does not support load_in_8bit or load_in_4bit; use `deepspeed: zero2`, or remove {key}"
    if cfg.dpo_generate_during_eval:
        yield (
            "dpo_generate_during_eval",
            f"{name} has no whole model to generate with; use `deepspeed: zero2`, or remove it",
        )
    if cfg.rl not in STRATEGIES or STRATEGIES[cfg.rl].reference_mode(cfg) != "live":
        return
    if cfg.adapter is None or cfg.reference_model is not None:
        others = [] if cfg.rl == "kto" or (cfg.trl is not None and cfg.trl.sync_ref_model) else ["`reference: cached`"]
        ways = [*others, "`deepspeed: zero2`", *(["`adapter: lora`"] if cfg.adapter is None else [])]
        yield key, f"{name} can't keep a reference model beside the policy; use {' or '.join(ways)}"
