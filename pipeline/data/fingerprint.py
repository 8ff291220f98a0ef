"""The fingerprint that names a prepared store: a hash of exactly the inputs that change its bytes."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.tokenize import opening_ids
from strategies import vision
from strategies.vision.sizes import SAVED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

__all__ = ["FORMAT_VERSION", "digest", "processor_identity", "tokenizer_identity"]

IRRELEVANT_SETTINGS = ("clean_up_tokenization_spaces", "local_files_only", "trust_remote_code", "use_fast")
"""Boolean settings of a tokenizer that change no ids: those of decoding and of loading."""
FORMAT_VERSION = 4
"""Incremented whenever the same inputs would produce different bytes."""


def digest(inputs: dict[str, Any]) -> str:
    """Return the first 20 hex digits of the SHA-256 of `inputs` as canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what decides a tokenizer's ids: class, serialised model, settings, special tokens, BOS and chat template."""
    return {
        "class": type(tokenizer).__name__,
        "model": hashlib.sha256(_serialized_model(tokenizer)).hexdigest(),
        "switches": {name: value for name, value in sorted(_settings(tokenizer)) if name not in IRRELEVANT_SETTINGS},
        "special_tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "opening_ids": opening_ids(tokenizer).tolist(),
        "chat_template": tokenizer.chat_template,
    }


def processor_identity(processor: ProcessorMixin) -> dict[str, Any]:
    """Return what decides how a processor places and counts the tokens of pictures; its tokenizer aside.

    `token` is what stands for a picture in texts of the store.
    """
    size = vision.size_of(processor)
    settings = {name: value for name, value in processor.to_dict().items() if name not in ("name_or_path", "_name_or_path")}
    # The same size is the same data, whether the recipe gives it or the processor was saved with it.
    settings["image_processor"] = {name: value for name, value in settings["image_processor"].items() if name != SAVED}
    return {
        "class": type(processor).__name__,
        "settings": json.loads(json.dumps(settings, sort_keys=True, default=str)),
        "chat_template": processor.chat_template,
        "token": processor.image_token,
        **({} if size is None else {"image_size": size.size, "image_resize_algorithm": size.algorithm}),
    }


def _settings(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Return the boolean settings of `tokenizer_config.json` with their current values."""
    # `split_special_tokens` is absent from many configs, and changes ids where a caller has set it.
    names = {*tokenizer.init_kwargs, "split_special_tokens"}
    # The attribute wins: a setting may have been changed after loading.
    values = ((name, getattr(tokenizer, name, tokenizer.init_kwargs.get(name))) for name in names)
    return ((name, value) for name, value in values if isinstance(value, bool))


def _serialized_model(tokenizer: PreTrainedTokenizerBase) -> bytes:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        with tempfile.TemporaryDirectory() as folder:  # slow tokenizers expose their merges only in files
            files = sorted(Path(folder, name) for name in tokenizer.save_vocabulary(folder))
            content = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        added = {token_id: repr(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        return json.dumps([content, tokenizer.get_vocab(), added], sort_keys=True).encode()
    truncation, padding = backend.truncation, backend.padding  # runtime state of the last call, not part of the model
    backend.no_truncation()
    backend.no_padding()
    try:
        return backend.to_str().encode()
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)
