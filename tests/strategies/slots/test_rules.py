"""Which configs can share a base."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from strategies.config import as_config
from strategies.models.adapter_start import keeps_base
from strategies.slots import EQUAL_KEYS, find_sharing_problems, unequal_keys
from strategies.slots.rules import KEEP_BASE

LORA: dict[str, Any] = {"base_model": "tiny", "rl": "dpo", "adapter": "lora"}


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rl": "ipo", "lora_r": 64, "peft_use_rslora": True, "lora_target_modules": ["q_proj"]},
        {"rl": "simpo", "peft_use_dora": True, "lora_dropout": 0.1, "peft_init_lora_weights": "gaussian"},
        {"rl": "kto", "gradient_checkpointing": True, "optimizer": "adafactor", "nonfinite_loss": "skip"},
    ],
)
def test_what_can_share(keys: dict[str, Any]) -> None:
    assert list(find_sharing_problems(as_config({**LORA, **keys}))) == []


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("adapter", {"adapter": None}),
        ("lora_modules_to_save", {"lora_modules_to_save": ["embed_tokens"]}),
        ("peft_layer_replication", {"peft_layer_replication": [(0, 2), (1, 2)]}),
        ("peft_init_lora_weights", {"peft_init_lora_weights": "pissa"}),
        ("torch_compile", {"torch_compile": True}),
        ("profile", {"profile": {"steps": [1, 2]}}),
        ("rl", {"rl": "grpo", "trl": {"num_generations": 2, "reward_funcs": ["tests.reward_functions.length"]}}),
    ],
)
def test_what_can_not_share_is_named(key: str, keys: dict[str, Any]) -> None:
    assert [path for path, _ in find_sharing_problems(as_config({**LORA, **keys}))] == [key]


@pytest.mark.parametrize("init", [init for init in KEEP_BASE if init is not None])
def test_the_initialisations_keep_the_base(init: Any) -> None:
    assert keeps_base(init)


def test_unequal_keys() -> None:
    one = as_config(LORA)
    assert unequal_keys(one, as_config({**LORA, "learning_rate": 1.0, "seed": 3, "lora_r": 2, "rl": "ipo"})) == []
    assert unequal_keys(one, as_config({**LORA, "bf16": False, "base_model": "other"})) == ["base_model", "bf16"]
    assert {"base_model", "chat_template", "tf32", "full_determinism", "plugins"} <= set(EQUAL_KEYS)


def test_rules_load_without_torch() -> None:
    code = "import sys, strategies.slots; strategies.slots.unequal_keys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
