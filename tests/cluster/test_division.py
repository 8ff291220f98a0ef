"""What divides a base that several runs share."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ClusterKeys
from cluster.division import divided_layers, find_division_problems


def keys(**given: Any) -> ClusterKeys:
    return ClusterKeys.model_validate({"ray": {"num_workers": 2}, **given})


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ({}, None),
        ({"deepspeed": "zero2"}, None),
        ({"deepspeed": "zero3"}, ()),
        ({"deepspeed": {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}}, ()),
        ({"fsdp_config": {}}, ()),
        ({"fsdp_config": {"transformer_layer_cls_to_wrap": "A, B", "reshard_after_forward": True}}, ("A", "B")),
    ],
)
def test_what_is_divided(given: dict[str, Any], layers: tuple[str, ...] | None) -> None:
    assert divided_layers(keys(**given)) == layers
    if layers is not None:
        assert list(find_division_problems(keys(**given))) == []


OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("given", "key", "why"),
    [
        ({"deepspeed": "zero1"}, "deepspeed", "divides what one trial trains; what trials share can be divided by zero3"),
        ({"deepspeed": "zero2_offload"}, "deepspeed", "divides what one trial trains"),
        ({"deepspeed": "zero3_offload"}, "deepspeed", "moves weights or state to host memory"),
        ({"deepspeed": OFFLOAD}, "deepspeed", "moves weights or state to host memory"),
        ({"fsdp_config": {"offload_params": True}}, "fsdp_config.offload_params", "keeps weights in host memory"),
        ({"fsdp_config": {"reshard_after_forward": False}}, "fsdp_config.reshard_after_forward", "false keeps layers whole"),
    ],
)
def test_what_can_not_be_divided(given: dict[str, Any], key: str, why: str) -> None:
    ((found, message),) = find_division_problems(keys(**given))
    assert found == key and message.startswith(why)
