"""The predicted memory of a worker: item by item against arithmetic, and as a whole against a process that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from strategies.config import as_config
from strategies.config.names import OPTIMIZERS
from strategies.memory import ITEMS, MemoryEstimate, estimate
from strategies.memory.measure import measure
from strategies.memory.optimizers import STATES, state_bytes
from tests.tiny import save_tiny, tiny_gpt2, tiny_model, tiny_tokenizer

WEIGHTS = sum(weight.numel() for weight in tiny_model(tiny_tokenizer()).parameters())
BUFFERS = 8 * 2 * 4
"""Bytes of two tables of rotary frequencies, one per dimension pair of a head of 16: the one in use and the original."""
LINEAR = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64))
"""Of two layers, inputs + outputs of every linear layer: q and o, k and v, gate and up, down."""


@pytest.fixture
def predict(config: dict[str, Any]) -> Callable[..., MemoryEstimate]:
    def make(world_size: int = 1, gpu: bool = False, **keys: Any) -> MemoryEstimate:
        return estimate({**config, **keys}, world_size, gpu)

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


def test_a_model_that_cannot_be_simulated_is_said(
    predict: Callable[..., MemoryEstimate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("sizes depend on values")

    monkeypatch.setattr("strategies.memory.step._run", fail)
    found = predict()
    assert found.activations == 34 * 2 * 256 * 64 * 2
    assert "llama can't be simulated" in found.notes[0]


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
    assert state_bytes(optimizer, [torch.empty(100, 80, device="meta")]) == ([expected], None)


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
    assert sum(state_bytes(optimizer, trainer.model.parameters())[0]) == held


def test_no_model_there(predict: Callable[..., MemoryEstimate], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_model: no such folder"):
        predict(base_model="/nowhere/at/all")
    with pytest.raises(ValueError, match="base_model: no model config could be loaded from"):
        predict(base_model=str(tmp_path))


def test_generated_rows_are_not_measured(config: dict[str, Any]) -> None:
    cfg = as_config({**config, "rl": "grpo", "trl": {"reward_funcs": ["tests.reward_functions.short"]}})
    with pytest.raises(ValueError, match="--measure: rl: grpo generates what it trains on"):
        measure(cfg)


@pytest.mark.processes
def test_the_prediction_is_near_the_measurement(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # glibc would keep freed tensors of up to 32 MiB for later: a matter of its own, up to half of a process.
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**20))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    base = save_tiny(tmp_path / "middle", **size)
    cfg = as_config({**config, "base_model": base, "tokens_per_forward": 381})
    measured, predicted = measure(cfg), estimate(cfg)
    assert measured.tokens == predicted.forward.tokens == 381
    above_base = measured.training - measured.base
    assert predicted.total - predicted.process == pytest.approx(above_base, rel=0.25)
