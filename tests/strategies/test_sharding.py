"""What DeepSpeed and FSDP2 would say of their dicts, said before workers start."""

from __future__ import annotations

from typing import Any

import pytest

from strategies.config import as_config
from strategies.models.sharding import find_problems

WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "a key": (
        {"deepspeed": {"zero_optimization": {"stage": 2, "overlap_com": True}}},
        "deepspeed.zero_optimization.overlap_com",
        "no key of DeepSpeed's; did you mean 'overlap_comm'?",
    ),
    "a value": (
        {"deepspeed": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "tape"}}}},
        "deepspeed.zero_optimization.offload_optimizer.device",
        "must be 'none', 'cpu' or 'nvme', got 'tape'",
    ),
    "a layer": (
        {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer, Qwen2DecoderLayer"}},
        "fsdp_config.transformer_layer_cls_to_wrap",
        "{base} has no layer of class 'Qwen2DecoderLayer'; write LlamaDecoderLayer, or remove it",
    ),
}
RIGHT: dict[str, dict[str, Any]] = {
    "auto": {"deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}},
    "a layer": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
    "nothing": {},
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_is_said(tiny_base: str, name: str) -> None:
    arguments, path, message = WRONG[name]
    assert list(find_problems(as_config({"base_model": tiny_base}), arguments)) == [(path, message.format(base=tiny_base))]


@pytest.mark.parametrize("name", list(RIGHT))
def test_what_is_right_passes(tiny_base: str, name: str) -> None:
    assert list(find_problems(as_config({"base_model": tiny_base}), RIGHT[name])) == []
