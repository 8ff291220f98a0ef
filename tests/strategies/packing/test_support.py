"""Which models can be trained on packed rows: those that say so and then score them as single sequences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedModel

from strategies.packing.layout import pack, pair_tokens
from strategies.packing.support import completion_logps, prepare_packing, score_row, why_not_packed
from tests.laws.runs import opinionated
from tests.tiny import seeded

PAIRS = [
    {"prompt_ids": [3, 4, 5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10, 11]},
    {"prompt_ids": [12], "chosen_ids": [13, 14], "rejected_ids": [15, 16, 17, 18, 19]},
    {"prompt_ids": [], "chosen_ids": [20, 21, 22], "rejected_ids": [23, 24]},
]
SIZE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "initializer_range": 0.3}
OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48, "init_std": 0.3, "dropout": 0.0}
PACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZE, "num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {**SIZE, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {**SIZE, "num_key_value_heads": 2, "head_dim": 8}),
    "gpt2": ("GPT2", GPT2),
    "mistral, wide window": ("Mistral", {**SIZE, "num_key_value_heads": 2, "sliding_window": 64}),
    "opt": ("OPT", {**SIZE, **OPT}),
    "gpt_neox": ("GPTNeoX", SIZE),
    "phi": ("Phi", SIZE),
    "granite, scaled logits": ("Granite", {**SIZE, "num_key_value_heads": 2, "logits_scaling": 3.0}),
    "llama, dynamic rope, short sequences": (
        "Llama",
        {**SIZE, "max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "hyperclovax, scaled logits": ("HyperCLOVAX", {**SIZE, "num_key_value_heads": 2, "logits_scaling": 3.0}),
    "cohere, scaled logits": ("Cohere", {**SIZE, "num_key_value_heads": 2, "logit_scale": 0.25}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral, narrow window": (
        "Mistral",
        {**SIZE, "num_key_value_heads": 2, "sliding_window": 8},
        "its attention window of 8 tokens is shorter than sequences of 64",
    ),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}, "mamba has an attention of its own"),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64}, "bloom has an attention of its own"),
    "gemma2": ("Gemma2", {**SIZE, "num_key_value_heads": 2, "head_dim": 8}, "gemma2 has an attention of its own"),
    "dynamic rope, long sequences": (
        "Llama",
        {**SIZE, "max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        "its rotary embedding \\(dynamic\\) changes for all pairs of a row",
    ),
    "eager": ("Llama", {**SIZE, "attn_implementation": "eager"}, "attn_implementation: eager doesn't take the mask"),
}


def build(name: str, keys: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**keys)
    causal = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    return seeded(causal, config).eval()


def apart(model: Any) -> torch.Tensor:
    """Log-probabilities of every completion, the chosen ones first, each from a forward of its own."""
    with torch.no_grad():
        return torch.cat(
            [
                completion_logps(model, pair["prompt_ids"], pair[name])
                for name in ("chosen_ids", "rejected_ids")
                for pair in PAIRS
            ]
        )


def together(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return score_row(model, pack([pair_tokens(pair) for pair in PAIRS], 8)).log_probs


@pytest.mark.parametrize("name", list(PACKS))
def test_models_that_pack(name: str) -> None:
    model = build(*PACKS[name])
    expected = apart(model)
    assert why_not_packed(model, longest=64) is None
    torch.testing.assert_close(together(model), expected, rtol=1e-4, atol=1e-4)
    # What else it does stays the same.
    torch.testing.assert_close(apart(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_do_not_pack_say_why_and_stay_as_they_are(name: str) -> None:
    kind, keys, reason = REFUSED[name]
    model = build(kind, keys)
    attention, expected = model.config._attn_implementation, apart(model)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why_not_packed(model, longest=64))
    assert model.config._attn_implementation == attention
    assert torch.equal(apart(model), expected)


def test_a_model_with_virtual_prompt_tokens_does_not_pack() -> None:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    reason = why_not_packed(get_peft_model(build(*PACKS["llama"]), config), longest=64)
    assert reason == "virtual prompt tokens stand before a whole row"


class Careless(LlamaModel):
    """Sees everything before it, whatever the mask says."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("packed", None)
        return super().forward(input_ids, position_ids=position_ids, **kwargs)


class Lost(LlamaModel):
    """Counts positions itself."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask, **kwargs)


class Unaware(LlamaModel):
    """Hands its attention the mask that it was given, and nothing else."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("packed", None)
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class Strict(LlamaModel):
    """Takes no arguments that it doesn't know."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, use_cache: Any = None
    ) -> Any:
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache)


def with_body(body: type[PreTrainedModel], **keys: Any) -> Any:
    model = seeded(LlamaForCausalLM, LlamaConfig(**{**SIZE, **keys})).eval()
    model.model.__class__ = body
    return model


@pytest.mark.parametrize("body", [Careless, Lost])
@pytest.mark.parametrize("scale", [0.3, 0.02], ids=["trained", "fresh"])
def test_a_model_that_misunderstands_packed_rows_is_caught(body: type[PreTrainedModel], scale: float) -> None:
    """Fresh weights say little about what a token has seen, and yet enough."""
    model = with_body(body, initializer_range=scale)
    with pytest.raises(ValueError, match="llama scores packed rows otherwise than single ones"):
        raise ValueError(why_not_packed(model, longest=64))
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_knows_only_the_mask_packs() -> None:
    model = with_body(Unaware)
    expected = apart(model)
    assert why_not_packed(model, longest=64) is None
    torch.testing.assert_close(together(model), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_run_a_packed_row_says_with_what_it_failed() -> None:
    model = with_body(Strict)
    assert "llama can't run a packed row (TypeError: " in str(why_not_packed(model, longest=64))
    assert model.config._attn_implementation == "sdpa"


def test_trying_out_leaves_the_mode_as_it_was() -> None:
    for training in (True, False):
        model = opinionated().train(training)
        why_not_packed(model, longest=64)
        assert model.training is training


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 13]}},
    ],
    ids=["linear", "dora", "saved head", "saved embedding", "adapted head", "adapted embedding", "trainable tokens"],
)
def test_an_adapter_is_part_of_what_packed_rows_score(keys: dict[str, Any]) -> None:
    """Also after training has moved it: a fresh adapter changes nothing, so that trying out can't tell."""
    model = get_peft_model(build(*PACKS["llama"]), LoraConfig(r=4, lora_alpha=16, **keys)).eval()
    reason = why_not_packed(model, longest=64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    if reason is None:
        torch.testing.assert_close(together(model), apart(model), rtol=1e-4, atol=1e-4)


def test_preparing_twice_changes_nothing() -> None:
    model = build(*PACKS["llama"])
    prepare_packing(model)
    once = together(model)
    prepare_packing(model)
    assert torch.equal(together(model), once)


def test_a_copy_of_a_prepared_model_computes_with_its_own_weights() -> None:
    model = build(*PACKS["llama"])
    prepare_packing(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight *= 2
        tokens = torch.tensor([[3, 4, 5]])
        torch.testing.assert_close(twin(input_ids=tokens).logits, 2 * model(input_ids=tokens).logits)
    assert not torch.equal(together(twin), together(model))
