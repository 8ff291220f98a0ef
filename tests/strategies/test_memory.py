"""The predicted memory of a worker: item by item against arithmetic, and as a whole against a process that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, Qwen3MoeConfig

from strategies.config import as_config
from strategies.config.names import OPTIMIZERS
from strategies.memory import ITEMS, LAYERS, MemoryEstimate, estimate, measure_peak
from strategies.memory.formula import LIBRARIES, STATES, state_bytes
from tests.tiny import SIZE, tiny_gpt2, tiny_model, tiny_qwen3, tiny_tokenizer

WEIGHTS = sum(weight.numel() for weight in tiny_model(tiny_tokenizer()).parameters())
BUFFERS = 8 * 2 * 4
"""Bytes of two tables of rotary frequencies, one per dimension pair of a head of 16: the one in use and the original."""
LINEAR = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64))
"""Of two layers, inputs + outputs of every linear layer: q and o, k and v, gate and up, down."""
LINEAR_WEIGHTS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
"""Of two layers, weights of the same linear layers."""


@pytest.fixture
def predict(config: dict[str, Any]) -> Callable[..., MemoryEstimate]:
    def make(world_size: int = 1, gpu: bool = False, sharding: str | None = None, **keys: Any) -> MemoryEstimate:
        return estimate({**config, **keys}, world_size, gpu, sharding)

    return make


def test_full_training_is_arithmetic(predict: Callable[..., MemoryEstimate]) -> None:
    found = predict()
    assert found.weights == 4 * WEIGHTS + BUFFERS
    assert found.gradients == 4 * WEIGHTS
    assert found.optimizer == 8 * WEIGHTS
    assert found.reference == found.buckets == 0
    assert found.total == sum(getattr(found, name) for name in ITEMS)
    assert not found.notes


def test_an_adapter_trains_a_few_weights(predict: Callable[..., MemoryEstimate]) -> None:
    found = predict(adapter="lora", lora_r=4)
    assert found.weights == 4 * (WEIGHTS + 4 * LINEAR) + BUFFERS
    assert found.gradients == 4 * 4 * LINEAR
    assert found.optimizer == 8 * 4 * LINEAR


@pytest.mark.parametrize(
    ("keys", "models"),
    [
        ({"reference": "live"}, 1),
        ({"reference": "live", "reference_model": "BASE"}, 1),
        ({"reference": "live", "adapter": "lora"}, 0),
        ({"rl": "simpo"}, 0),
        ({"rl": "kto"}, 1),
    ],
)
def test_a_live_reference_is_a_second_model(
    predict: Callable[..., MemoryEstimate], base: str, keys: dict[str, Any], models: int
) -> None:
    keys = {name: base if value == "BASE" else value for name, value in keys.items()}
    assert predict(**keys).reference == models * (4 * WEIGHTS + BUFFERS)


def test_workers_exchange_buckets(predict: Callable[..., MemoryEstimate]) -> None:
    assert predict(world_size=2).buckets == 4 * WEIGHTS


def test_half_precision_weights(predict: Callable[..., MemoryEstimate]) -> None:
    found = predict(bf16="full")
    assert found.gradients == 2 * WEIGHTS
    assert found.optimizer == 4 * WEIGHTS


def test_activations_grow_with_the_tokens(predict: Callable[..., MemoryEstimate]) -> None:
    sizes = [predict(tokens_per_forward=254 * number).activations for number in (1, 2, 3)]
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.1)
    assert sizes[2] / sizes[0] == pytest.approx(3, rel=0.15)


def test_a_joint_forward_has_more_rows_than_one_run(config: dict[str, Any]) -> None:
    lora = {**config, "adapter": "lora", "tokens_per_forward": 254}
    found = estimate(lora, joint_tokens=1024)
    same = estimate({**lora, "tokens_per_forward": 1024})
    assert found.forward.tokens == 1024 and found.total == pytest.approx(same.total, rel=0.01)
    assert estimate(lora, joint_tokens=8) == estimate(lora)
    padded = {**lora, "tokens_per_forward": None, "sample_packing": False}
    assert estimate(padded, joint_tokens=1024) == estimate(padded)


@pytest.mark.parametrize(
    ("keys", "most"),
    [
        ({"gradient_checkpointing": True}, 0.5),
        ({"gradient_checkpointing": True, "adapter": "lora"}, 0.5),
        ({"bf16": True}, 1),
    ],
)
def test_checkpointing_and_autocast_shrink_activations(
    predict: Callable[..., MemoryEstimate], keys: dict[str, Any], most: float
) -> None:
    deep = {"overrides_of_model_config": {"num_hidden_layers": 4}}
    assert predict(**keys, **deep).activations < most * predict(**deep).activations


def test_the_token_head_holds_some_logits_at_once(predict: Callable[..., MemoryEstimate]) -> None:
    found = [predict(overrides_of_model_config={"vocab_size": size}).token_head for size in (2**15, 2**17)]
    assert found[0] > 254 * 2**15 * 4
    assert found[1] > found[0]


def test_the_token_head_of_padded_batches_holds_a_tile(predict: Callable[..., MemoryEstimate]) -> None:
    wide: dict[str, Any] = {"sample_packing": False, "overrides_of_model_config": {"vocab_size": 2**17}}
    on_cpu, on_gpu = predict(**wide), predict(gpu=True, **wide)
    tile, gradient = 512 * 2**15, 4 * 64 * 2**17
    assert on_cpu.token_head == 33 * tile + gradient
    assert on_gpu.token_head == 4 * tile + gradient


def test_padded_batches(predict: Callable[..., MemoryEstimate]) -> None:
    found = predict(sample_packing=False, micro_batch_size=3)
    assert (found.forward.packed, found.forward.tokens, found.forward.pairs) == (False, 3 * 2 * 128, 3)
    assert found.forward.padded_because is None
    assert found.activations > predict().activations


def test_a_model_that_cannot_pack_is_padded(predict: Callable[..., MemoryEstimate]) -> None:
    found = predict(attn_implementation="eager")
    assert found.forward.padded_because == "attn_implementation: eager doesn't take the mask"
    assert found.forward.tokens == 2 * 2 * 128


def test_another_family(predict: Callable[..., MemoryEstimate], tmp_path: Path) -> None:
    model: GPT2LMHeadModel = tiny_gpt2(tiny_tokenizer())
    model.save_pretrained(str(tmp_path))
    tiny_tokenizer().save_pretrained(str(tmp_path))
    found = predict(base_model=str(tmp_path))
    assert found.gradients == 4 * sum(weight.numel() for weight in model.parameters())  # the tied head once
    assert not found.notes


def test_layers_that_the_formula_does_not_know_are_named(predict: Callable[..., MemoryEstimate], tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 259}
    Qwen3MoeConfig(**SIZE, **experts).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = predict(base_model=str(tmp_path))
    assert found.notes[0].startswith(
        "qwen3_moe has more than attention and an MLP in its layers: activations are roughly those of"
    )
    assert found.activations > 0


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "optimizer"),
    # As `benchmarks.sharding_memory` counts them at two workers; ZeRO-1 and 2 add a float32 copy of the weights.
    [("zero1", 1, 1, 1.5), ("zero2", 1, 1, 1.5), ("zero3", 0.5, 0.5, 1), ("fsdp2", 0.5, 0.5, 1)],
)
def test_shares_of_a_divided_model(
    predict: Callable[..., MemoryEstimate], sharding: str, weights: float, gradients: float, optimizer: float
) -> None:
    whole, found = predict(world_size=2), predict(world_size=2, sharding=sharding)
    layer = 4 * (LINEAR_WEIGHTS // 2 + 2 * 64) if weights < 1 else 0
    assert found.weights - layer == pytest.approx(weights * whole.weights, abs=BUFFERS)
    assert found.gradients == gradients * whole.gradients
    assert found.optimizer == optimizer * whole.gradients
    assert found.checkpoint == whole.checkpoint == 12 * WEIGHTS
    assert (whole.buckets, found.buckets) == (4 * WEIGHTS, 0)


def test_a_shared_base_is_divided_by_its_layers(predict: Callable[..., MemoryEstimate]) -> None:
    """What is trained is whole on each worker."""
    keys: dict[str, Any] = {"adapter": "lora", "lora_r": 4}
    whole, found = predict(world_size=4, **keys), predict(world_size=4, sharding=LAYERS, **keys)
    one = 4 * (LINEAR_WEIGHTS // 2 + 2 * 64)
    assert whole.weights - found.weights == 2 * one - 2 * one // 4 - one
    assert {**found.items(), "weights": 0} == {**whole.items(), "weights": 0} and found.undivided == whole.total


def test_deepspeed_keeps_weights_of_half_precision(predict: Callable[..., MemoryEstimate]) -> None:
    whole, found = predict(world_size=4, bf16=True), predict(world_size=4, sharding="zero2", bf16=True)
    assert (found.weights, found.gradients) == (whole.weights // 2, 2 * WEIGHTS)
    assert found.optimizer == 12 * WEIGHTS // 4
    assert predict(world_size=4, sharding="fsdp2", bf16=True).optimizer == 8 * WEIGHTS // 4


def test_new_tokens_grow_the_embeddings(predict: Callable[..., MemoryEstimate]) -> None:
    assert predict(tokens=["<a>", "<b>"]).gradients == 4 * (WEIGHTS + 2 * 2 * 64)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", 0),
        ("adagrad", 4 * 8000),
        ("adamw_torch_fused", 8 * 8000),
        ("adamw_8bit", 2 * (8000 + 4 * 32)),
        ("adafactor", 4 * (100 + 80)),
        ("ademamix", 12 * 8000),
    ],
)
def test_states(optimizer: str, expected: int) -> None:
    assert state_bytes(optimizer, [torch.empty(100, 80, device="meta")]) == (expected, None)


def test_an_unknown_optimizer_is_said(predict: Callable[..., MemoryEstimate]) -> None:
    assert set(STATES) < set(OPTIMIZERS)
    found = predict(optimizer="adalomo")
    assert found.optimizer == 8 * WEIGHTS
    assert found.notes == ("optimizer: what adalomo keeps is not known here; AdamW's state is counted instead",)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "rmsprop", "adagrad", "sgd"])
def test_states_are_those_of_the_optimizer(optimizer: str, build: Callable[..., Any]) -> None:
    trainer = build(1, optimizer=optimizer)
    trainer.train()
    state = trainer.optimizer.state_dict()["state"].values()
    held = sum(value.nbytes for one in state for value in one.values() if torch.is_tensor(value) and value.ndim)
    assert state_bytes(optimizer, trainer.model.parameters())[0] == held


def test_no_model_there(predict: Callable[..., MemoryEstimate], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model: no such folder"):
        predict(base_model="/nowhere/at/all")
    with pytest.raises(ValueError, match="base_model: no model config could be loaded from"):
        predict(base_model=str(tmp_path))


def test_generated_rows_are_not_measured(config: dict[str, Any]) -> None:
    cfg = as_config({**config, "rl": "grpo", "trl": {"reward_funcs": ["tests.reward_functions.short"]}})
    with pytest.raises(ValueError, match="--measure: rl: grpo generates what it trains on"):
        measure_peak(cfg)


WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
"""Where weights and activations outweigh what every trainer takes."""
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model(tiny_tokenizer(), **WIDE),
    "qwen3": lambda: tiny_qwen3(tiny_tokenizer(), **WIDE, head_dim=64),
    "gpt2": lambda: tiny_gpt2(tiny_tokenizer(), n_embd=512, n_layer=8, n_head=8),
}
LORA, PADDED, CHECKPOINTED = {"adapter": "lora"}, {"sample_packing": False}, {"gradient_checkpointing": True}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        # Each takes a process: any two of family, adapter, padding and checkpointing meet in one of them.
        ("llama", {}),
        ("llama", LORA | PADDED | CHECKPOINTED),
        ("qwen3", LORA),
        ("qwen3", PADDED | CHECKPOINTED),
        ("gpt2", PADDED),
        ("gpt2", LORA | CHECKPOINTED),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "full",
)
def test_the_prediction_is_near_the_measurement(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, keys: dict[str, Any]
) -> None:
    # glibc would keep freed tensors of up to 32 MiB for later: a matter of its own, up to half of a process.
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**20))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    sizes = {"sequence_len": 256, "tokens_per_forward": 1020} if "sample_packing" not in keys else {"sequence_len": 256}
    cfg = as_config({**config, "base_model": str(tmp_path / "base"), **sizes, **keys})
    measured, predicted = measure_peak(cfg), estimate(cfg)
    assert measured.tokens == predicted.forward.tokens == (1020 if predicted.forward.packed else 1024)
    # What all libraries take is left out on both sides: it would hide an error of the rest.
    assert predicted.total - LIBRARIES == pytest.approx(measured.training - measured.base, rel=0.15)
