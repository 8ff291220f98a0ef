"""The tokenizer of a config: base tokenizer, special tokens, added tokens, chat template."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from strategies.chat_templates import resolve_chat_template
from strategies.gguf import unpacked
from strategies.locations import resolve_model_location

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TOKENIZER_KEYS", "load_tokenizer"]

TOKENIZER_KEYS = (
    "base_model",
    "revision_of_model",
    "tokenizer_config",
    "tokenizer_use_fast",
    "trust_remote_code",
    "special_tokens",
    "tokens",
    "chat_template",
    "chat_template_jinja",
)
"""The config keys that decide the tokenizer; nothing else does."""


def load_tokenizer(cfg: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `cfg` describes, ready for training.

    The chat template stays the tokenizer's own unless `chat_template` names another; a tokenizer without one is
    fine as long as nothing asks for it. A missing pad token becomes the eos token.

    Raises:
        ValueError: when there is no tokenizer, or none can be loaded, at the given place.
    """
    from transformers import AutoTokenizer

    key = "tokenizer_config" if cfg.tokenizer_config else "base_model"
    location = resolve_model_location(getattr(cfg, key), key)
    kwargs: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if cfg.tokenizer_use_fast is not None:
        kwargs["use_fast"] = cfg.tokenizer_use_fast
    if cfg.revision_of_model and not cfg.tokenizer_config:
        kwargs["revision"] = cfg.revision_of_model
    try:
        source = unpacked(location, "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(source.path, **source.kwargs, **kwargs)
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"{location.key}: no tokenizer could be loaded from {location.given!r}: {error}") from error
    _set_tokens(tokenizer, cfg)
    if cfg.chat_template or cfg.chat_template_jinja:
        tokenizer.chat_template = resolve_chat_template(cfg.chat_template, cfg.chat_template_jinja, tokenizer)
    return tokenizer


def _set_tokens(tokenizer: PreTrainedTokenizerBase, cfg: Any) -> None:
    if cfg.special_tokens is not None:
        given = cfg.special_tokens.model_dump(exclude_none=True)
        tokenizer.add_special_tokens(given)
    if cfg.tokens:
        tokenizer.add_tokens(list(cfg.tokens))
    if tokenizer.eos_token is None:
        raise ValueError("special_tokens.eos_token: the tokenizer has no eos token; name one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
