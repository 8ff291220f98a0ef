"""Bases and adapters in folders, and what `strategies.merging` makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from strategies.config import as_config
from strategies.merging.policy import Merged, Policy
from tests.tiny import tiny_tokenizer

__all__ = ["IDS", "change", "logits", "merge_folder", "open_policy", "unmerged", "write_adapter"]

IDS = torch.arange(2, 102)[None]
"""Tokens of a sequence, (1, 100)."""


def write_adapter(folder: Path, base: PreTrainedModel, *, save_embeddings: bool = False, **keys: Any) -> PeftModel:
    """Put an adapter on `base` that changes what it says, and write it; `keys` are LoraConfig's."""
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **keys}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return model.eval()


def open_policy(base: Path, adapter: Path) -> Policy:
    """The adapter in a folder on the base in another."""
    return Policy(as_config({"base_model": str(base), "rl": "dpo"}), adapter)


def merge_folder(
    base: Path, adapter: Path, out: Path, *, dtype: torch.dtype | None = None, shard_size: int | str = "5GB"
) -> Merged:
    """Merge, and write the merged model."""
    merged = open_policy(base, adapter).merge(dtype)
    merged.save(out, tiny_tokenizer(), shard_size)
    return merged


def unmerged(base: Path, adapter: Path, prepare: Callable[[Any], Any] = lambda model: None) -> PeftModel:
    """The base with the adapter beside it, in float32, as PEFT loads them."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    prepare(model)
    return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Logits of `IDS`, float32 (100, vocabulary)."""
    return model(IDS).logits[0].float()


def change(file: Path, **values: Any) -> None:
    """Set values of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
