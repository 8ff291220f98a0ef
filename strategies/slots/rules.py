"""Which configs can share a base. Loads without torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from strategies.config.model import ModelKeys
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    from strategies.config.schema import StrategyConfig

__all__ = ["EQUAL_KEYS", "find_sharing_problems", "unequal_keys"]

Problem = tuple[str, str]

OWN_MODEL_KEYS = ("gradient_checkpointing", "gradient_checkpointing_kwargs")
"""Keys of the model that slots of one base may set differently."""
EQUAL_KEYS = (
    *(name for name in ModelKeys.model_fields if name not in OWN_MODEL_KEYS),
    *("full_determinism", "accelerator_config", "ddp_timeout", "deepspeed", "fsdp_config", "plugins"),
)
"""Keys by which two trials need different bases, precisions, process groups or registries."""
KEEP_BASE = (None, True, False, "gaussian", "orthogonal")
"""Initialisations of adapters that leave the base's weights alone; PiSSA and OLoRA, for example, don't."""
ALONE = {
    "lora_modules_to_save": "trains whole modules of the base",
    "peft_layer_replication": "changes the base's layers",
    "torch_compile": "compiles the base",
    "profile": "traces the process, with the steps of all trials",
}
"""Keys with which a trial needs a run of its own, and why."""


def find_sharing_problems(cfg: StrategyConfig) -> Iterator[Problem]:
    """Yield (key, message) for every reason why a trial can't share a base with others; nothing if it can.

    Keys that divide models among workers are those of a config with a cluster, which says itself what a host can divide.
    """
    if cfg.adapter is None:
        yield "adapter", "not set: it trains the base itself; write adapter: lora"
    for name, why in ALONE.items():
        if getattr(cfg, name):
            yield name, f"{why}, which others would see"
    if cfg.peft_init_lora_weights not in KEEP_BASE:
        yield "peft_init_lora_weights", f"{cfg.peft_init_lora_weights!r} changes the base's weights; write true, or gaussian"
    if get_strategy(cfg.rl).batch_kind == "prompt":
        yield "rl", f"{cfg.rl} generates answers in its steps, for which no turns are given"


def unequal_keys(cfg: StrategyConfig, other: StrategyConfig) -> list[str]:
    """Return the keys in which two trials differ and because of which they can't share a base."""
    return [name for name in EQUAL_KEYS if getattr(cfg, name, None) != getattr(other, name, None)]
