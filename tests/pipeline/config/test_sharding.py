"""Keys that don't go together with sharding, found before workers start."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.errors import ConfigError

RECIPE = {"base_model": "model", "datasets": [{"path": "rows.jsonl"}], "val_set_size": 4, "ray": {"num_workers": 2}}
LORA = {"adapter": "lora"}
FSDP: dict[str, Any] = {"fsdp_config": {"fsdp_version": 2}}
ZERO3 = {"deepspeed": "zero3"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "8 bits": (
        {**FSDP, **LORA, "load_in_8bit": True},
        "load_in_8bit: FSDP2 does not support load_in_8bit or load_in_4bit; use `deepspeed: zero2`, or remove fsdp_config",
    ),
    "4 bits": ({**ZERO3, "adapter": "qlora", "load_in_4bit": True}, "load_in_4bit: ZeRO-3 does not support load_in_8bit or"),
    "optimizer": (
        {**ZERO3, "optimizer": "lomo"},
        "optimizer: lomo can't be used with deepspeed, which hands it pieces of weights; use one of adagrad, adamw_torch, ",
    ),
    "optimizer of FSDP2": ({**FSDP, "optimizer": "adafactor"}, "optimizer: adafactor can't be used with fsdp_config"),
    "live": (
        {**FSDP, "reference": "live"},
        "fsdp_config: FSDP2 can't keep a reference model beside the policy; use `reference: cached` or `deepspeed: zero2` or "
        "`adapter: lora`",
    ),
    "another live": (
        {**ZERO3, **LORA, "reference": "live", "reference_model": "other"},
        "deepspeed: ZeRO-3 can't keep a reference model beside the policy; use `reference: cached` or `deepspeed: zero2`",
    ),
    "synced": (
        {**ZERO3, "trl": {"sync_ref_model": True}},
        "deepspeed: ZeRO-3 can't keep a reference model beside the policy; use `deepspeed: zero2` or `adapter: lora`",
    ),
    "kto": (
        {**ZERO3, "rl": "kto"},
        "deepspeed: ZeRO-3 can't keep a reference model beside the policy; use `deepspeed: zero2` or `adapter: lora`",
    ),
    "grpo": (
        {"deepspeed": "zero1", "rl": "grpo", "trl": {"reward_funcs": ["r.f"], "num_generations": 2}},
        "deepspeed: doesn't go with rl: grpo, which generates with whole models; remove it to train under DDP",
    ),
    "generating": (
        {**FSDP, **LORA, "dpo_generate_during_eval": True},
        "dpo_generate_during_eval: FSDP2 has no whole model to generate with; use `deepspeed: zero2`, or remove it",
    ),
    "another precision": (
        {"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16": False},
        "deepspeed.bf16.enabled: must agree with the recipe's `bf16: false`, or be auto; got true",
    ),
    "the keys themselves": ({"deepspeed": "zero9", "optimizer": "lomo"}, "deepspeed: unknown stage 'zero9'"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_does_not_go_together_is_said(name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({**RECIPE, **given})


RIGHT: dict[str, dict[str, Any]] = {
    "full": ZERO3,
    "lora": {**FSDP, **LORA},
    "lora beside its base": {**FSDP, **LORA, "reference": "live"},
    "quantized": {"deepspeed": "zero2", "adapter": "qlora", "load_in_4bit": True},
    "kto": {"deepspeed": "zero2", "rl": "kto"},
    "kto of an adapter": {**ZERO3, **LORA, "rl": "kto"},
    "simpo": {**FSDP, "rl": "simpo"},
    "generating": {"deepspeed": "zero1", **LORA, "dpo_generate_during_eval": True},
    "the recipe's precision": {"deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "bf16": True},
    "Axolotl's false": {"deepspeed": None, "fsdp_config": None},
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_what_goes_together_is_taken(name: str) -> None:
    parse_config({**RECIPE, **RIGHT[name]})
