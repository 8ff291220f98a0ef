"""The name of a prepared store: a hash of exactly what changes its bytes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pipeline.data.tokenise import opening_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMAT_VERSION", "digest", "tokenizer_identity"]

FORMAT_VERSION = 3
"""Raised whenever the same input would give other bytes."""


def digest(inputs: dict[str, Any]) -> str:
    """20 hex digits of the SHA-256 of `inputs` as canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer does to text: its serialised model, special tokens, BOS habit and chat template."""
    return {
        "model": hashlib.sha256(_model(tokenizer).encode()).hexdigest(),
        "special_tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "opening_ids": opening_ids(tokenizer).tolist(),
        "chat_template": tokenizer.chat_template,
    }


def _model(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    model = json.loads(backend.to_str())
    # set by whoever called the tokenizer last, and reset by our own calls
    model.pop("truncation", None)
    model.pop("padding", None)
    return json.dumps(model, sort_keys=True)
