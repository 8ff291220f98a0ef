"""The processor of a config: how its model takes pictures."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from strategies.models.config import load_config
from strategies.models.location import resolve_model_location

__all__ = ["find_processor", "load_processor"]


def find_processor(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | None:
    """Load the processor of `cfg.base_model` as `load_processor`; None where the model takes no pictures.

    Raises:
        ValueError: as `load_config` and `load_processor`.
    """
    return load_processor(cfg, tokenizer) if getattr(load_config(cfg), "vision_config", None) is not None else None


def load_processor(cfg: Any, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """Load the processor of `cfg.base_model`, with the tokenizer of the config and its chat template.

    Raises:
        ValueError: if the model has none, or its picture processor can't be loaded.
    """
    location = resolve_model_location(cfg.base_model)
    revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model else {}
    try:
        processor = AutoProcessor.from_pretrained(location.path, trust_remote_code=cfg.trust_remote_code, **revision)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"base_model: no processor of pictures could be loaded from {location.given!r}: {error}") from error
    # For a folder without a processor AutoProcessor returns its tokenizer, or its image processor alone.
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"base_model: {location.given!r} has no processor of pictures (a {type(processor).__name__} was found); "
            "give a vision-language model, whose folder has preprocessor_config.json"
        )
    # Otherwise the processor keeps its own template: the tokenizer's may have no placeholders for pictures.
    if cfg.chat_template or cfg.chat_template_jinja:
        processor.chat_template = tokenizer.chat_template
    # The policy's, with the added tokens of the config: rows with pictures are tokenised by the processor.
    processor.tokenizer = tokenizer
    return processor
