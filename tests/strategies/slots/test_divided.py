"""A base whose layers are divided, here among one worker: their memory is freed, and filled when they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from strategies.slots import BaseChanged, DividedBase, SharedBase
from tests.tiny import tiny_gpt2, tiny_model, tiny_qwen, tiny_tokenizer

IDS = torch.arange(12).unsqueeze(0)
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def one_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(base: SharedBase, **keys: Any) -> dict[str, torch.Tensor]:
    """Gradients of a new adapter on the base."""
    torch.manual_seed(0)
    policy = get_peft_model(base.new_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, **keys)).train()
    policy(input_ids=IDS, labels=IDS).loss.backward()
    return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("make", [tiny_qwen, tiny_gpt2])
def test_families(make: Any) -> None:
    """Tied heads, biases, and layers that return tuples or keep their weights transposed."""
    base = DividedBase(make(tiny_tokenizer()))
    found, expected = (
        trained(base, use_dora=make is tiny_qwen),
        trained(SharedBase(make(tiny_tokenizer())), use_dora=make is tiny_qwen),
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    base.check_unchanged()


def test_an_adapter_beside_a_dora_adapter() -> None:
    """Such as the frozen copy of one that is trained on; it begins with the norms of weights."""
    base = DividedBase(tiny_model(tiny_tokenizer()))
    policy = get_peft_model(base.new_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True))
    policy.add_adapter("ref", policy.peft_config["default"])
    magnitudes = {name: parameter for name, parameter in policy.named_parameters() if "magnitude" in name}
    copies = {name.replace(".default.", ".ref."): parameter for name, parameter in magnitudes.items() if ".default." in name}
    assert len(copies) == 4 and all(torch.equal(magnitudes[name], value) for name, value in copies.items())


def test_what_is_divided_and_what_is_not() -> None:
    model = tiny_model(tiny_tokenizer())
    first, second = model.model.layers
    second.input_layernorm.weight = first.input_layernorm.weight  # needed by one layer while only the other one is gathered
    size = SharedBase(model).nbytes
    base = DividedBase(model)
    empty = {name for name, parameter in base.new_model().named_parameters() if not parameter.untyped_storage().nbytes()}
    assert empty == {name for name, _ in model.named_parameters() if ".layers." in name} - {
        "model.layers.0.input_layernorm.weight"
    }
    assert base.nbytes == size
    assert set(base.names_in(base.new_model())) >= empty


def test_layers_are_found_by_their_class() -> None:
    base = DividedBase(tiny_model(tiny_tokenizer()), classes=["LlamaMLP"])
    empty = {name for name, parameter in base.model.named_parameters() if not parameter.untyped_storage().nbytes()}
    assert len(empty) == 6 and all(".mlp." in name for name in empty)
    with pytest.raises(ValueError, match="base_model: llama has no layers of class LlamaBlock, which could be divided"):
        DividedBase(tiny_model(tiny_tokenizer()), classes=["LlamaBlock"])


def test_a_trainer_can_move_it_to_where_it_is() -> None:
    base = DividedBase(tiny_model(tiny_tokenizer()))
    model = base.new_model()
    model.to(torch.device("cpu:0"))
    base.check_unchanged()
    with pytest.raises(ValueError, match=r"a divided base stays torch.float32 on cpu; wanted was torch.bfloat16 on cpu"):
        model.to(torch.bfloat16)


def test_changes_are_found() -> None:
    base = DividedBase(tiny_model(tiny_tokenizer()))
    model = base.new_model()
    model(input_ids=IDS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(BaseChanged, match=r"1 weights .* changed, such as model.layers.1.mlp.up_proj.weight"):
        base.check_unchanged()
    model.get_parameter(QUERY).data = torch.ones(64, 64)
    with pytest.raises(BaseChanged, match=f"weights of the shared base were replaced, such as {QUERY}"):
        base.check_unchanged()
