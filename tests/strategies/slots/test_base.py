"""The base's weights are held once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from strategies.compat import leave_out_of_ddp
from strategies.slots import BaseChanged, SharedBase
from tests.tiny import tiny_gpt2, tiny_model, tiny_qwen, tiny_tokenizer

MODELS = {"llama": tiny_model, "tied": tiny_qwen, "gpt2": tiny_gpt2}


def storages(*models: Any) -> dict[int, int]:
    """Address and bytes of every storage of parameters and buffers."""
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("family", list(MODELS))
def test_models_add_nothing_but_their_adapters(family: str) -> None:
    base = SharedBase(MODELS[family](tiny_tokenizer()))
    policies = [get_peft_model(base.new_model(), LoraConfig(r=4, target_modules="all-linear")) for _ in range(3)]
    adapters = [parameter for policy in policies for parameter in policy.parameters() if parameter.requires_grad]
    assert sum(storages(*policies).values()) == base.nbytes + sum(parameter.nbytes for parameter in adapters)
    assert base.nbytes == sum(storages(base.model).values())
    for policy in policies:
        frozen = {name for name, parameter in policy.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
        assert frozen <= set(base.names_in(policy))


def test_models_have_modules_and_configs_of_their_own() -> None:
    base = SharedBase(tiny_model(tiny_tokenizer()))
    model = base.new_model()
    model.config.use_cache = not base.model.config.use_cache
    model.train()
    base.model.eval()
    assert model.training and model.config.use_cache != base.model.config.use_cache
    assert not set(map(id, model.modules())) & set(map(id, base.model.modules()))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_the_base_is_found(init: str) -> None:
    base = SharedBase(tiny_model(tiny_tokenizer()))
    get_peft_model(base.new_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=init))
    with pytest.raises(BaseChanged, match="2 weights of the shared base were changed, such as model.layers.0.self_attn.q_proj"):
        base.check_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_changed_bit_is_found_and_a_move_is_none(dtype: torch.dtype) -> None:
    base = SharedBase(tiny_model(tiny_tokenizer()).to(dtype))
    for parameter in base.model.parameters():
        parameter.data = parameter.data.clone()
    base.check_unchanged()
    weight = base.model.lm_head.weight.data
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(1.0, dtype=dtype))
    with pytest.raises(BaseChanged, match="1 weights"):
        base.check_unchanged()


def test_ddp_sends_the_adapter_alone() -> None:
    """Otherwise each trial would send the whole base to all workers as it begins."""
    base = SharedBase(tiny_qwen(tiny_tokenizer()))
    policy = get_peft_model(base.new_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    leave_out_of_ddp(policy, base.names_in(policy))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ignored = torch.nn.parallel.DistributedDataParallel(policy).parameters_to_ignore
    finally:
        dist.destroy_process_group()
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in (*policy.named_parameters(), *policy.named_buffers())}
    assert everything - set(ignored) == trained
