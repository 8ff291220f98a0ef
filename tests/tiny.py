"""Tiny models, tokenizers and pairs, built in code: nothing is downloaded, everything takes milliseconds.

`tiny_tokenizer()` is byte-level (any text can be encoded), has no bos, ends turns with `<|im_end|>` and speaks ChatML.
`tiny_model(tokenizer)` is a Llama of two layers and width 64 with random weights that depend on `seed` only; `tiny_qwen`,
`tiny_qwen3`, `tiny_gemma3` and `tiny_gpt2` are models of other families, of the same size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from strategies.models.chat_templates import CHATML

__all__ = [
    "adapter_folder",
    "labelled",
    "pairs",
    "prepared_labelled",
    "prepared_pairs",
    "save_tiny",
    "seeded",
    "tiny_gemma3",
    "tiny_gpt2",
    "tiny_model",
    "tiny_qwen",
    "tiny_qwen3",
    "tiny_tokenizer",
]

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 259 tokens: 256 bytes, pad, `<|im_start|>`, `<|im_end|>` (eos)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL_TOKENS[0], eos_token=SPECIAL_TOKENS[2])
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A float32 Llama (2 layers, width 64, 4 heads) for `tokenizer`; `overrides` go to its config.

    The global random state is left as it was.
    """
    config = LlamaConfig(**{**SIZE, **_vocabulary(tokenizer), **overrides})
    return seeded(LlamaForCausalLM, config, seed)


def tiny_qwen(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides: Any) -> Qwen2ForCausalLM:
    """A Qwen2 of the size of `tiny_model`: biases in the attention, and a head that is the embedding."""
    config = Qwen2Config(**{**SIZE, "tie_word_embeddings": True, **_vocabulary(tokenizer), **overrides})
    return seeded(Qwen2ForCausalLM, config, seed)


def tiny_qwen3(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
    """A Qwen3 of the size of `tiny_model`: queries and keys are normalised, and the head is the embedding."""
    config = Qwen3Config(**{**SIZE, "head_dim": 16, "tie_word_embeddings": True, **_vocabulary(tokenizer), **overrides})
    return seeded(Qwen3ForCausalLM, config, seed)


def tiny_gemma3(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides: Any) -> Gemma3ForCausalLM:
    """A Gemma 3 of the size of `tiny_model`: one layer looks back 32 tokens, the other one over everything."""
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
    config = Gemma3TextConfig(**{**SIZE, **layers, "head_dim": 16, **_vocabulary(tokenizer), **overrides})
    return seeded(Gemma3ForCausalLM, config, seed)


def tiny_gpt2(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """A GPT-2 of the size of `tiny_model`: learned positions, biases, dropout, and a head that is the embedding."""
    size = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
    return seeded(GPT2LMHeadModel, GPT2Config(**{**size, **_vocabulary(tokenizer), **overrides}), seed)


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {"vocab_size": len(tokenizer), "bos_token_id": None, **tokens}


def seeded(kind: type[PreTrainedModel], config: Any, seed: int = 0) -> Any:
    """A model of random weights that depend on `seed` only; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def save_tiny(folder: str | Path, seed: int = 0, **overrides: Any) -> str:
    """Write a tiny model and its tokenizer as a Hugging Face folder; returns the folder as text."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, seed, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapter_folder(folder: str | Path) -> str:
    """Write an adapter of the tiny model that changes what it says; returns the folder as text."""
    policy = get_peft_model(tiny_model(tiny_tokenizer()), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, param in policy.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                param.copy_(torch.linspace(-0.2, 0.2, param.numel()).view_as(param))
    policy.save_pretrained(str(folder), save_embedding_layers=False)
    return str(folder)


def pairs(number: int) -> list[dict[str, str]]:
    """Different raw pairs of plain text, of various lengths: `prompt`, `chosen`, `rejected`."""
    return [
        {
            "prompt": f"What is {row} plus {row % 5}? ",
            "chosen": f"It is {row + row % 5}" + "!" * (row % 7),
            "rejected": "No idea" + "." * (row * 3 % 11),
        }
        for row in range(number)
    ]


def labelled(number: int) -> list[dict[str, Any]]:
    """Raw labelled completions, three good ones for every two bad ones: `prompt`, `completion`, `label`."""
    rows = []
    for row, pair in enumerate(pairs(number)):
        good = row % 5 < 3
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good})
    return rows


def prepared_labelled(number: int) -> list[dict[str, Any]]:
    """The rows of `labelled` as a prepared store holds them."""
    tokenizer = tiny_tokenizer()
    rows = []
    for index, row in enumerate(labelled(number)):
        completion = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"row_id": index, "prompt_ids": tokenizer(row["prompt"])["input_ids"], "completion_ids": completion, **row})
    return rows


def prepared_pairs(number: int) -> list[dict[str, Any]]:
    """The rows of `pairs` as a prepared store holds them: ids, with the text beside them."""
    tokenizer = tiny_tokenizer()
    rows = []
    for index, pair in enumerate(pairs(number)):
        ids = {f"{name}_ids": tokenizer(text)["input_ids"] for name, text in pair.items()}
        for name in ("chosen_ids", "rejected_ids"):
            ids[name].append(tokenizer.eos_token_id)
        rows.append({"row_id": f"{index:04d}", **ids, **pair})
    return rows
