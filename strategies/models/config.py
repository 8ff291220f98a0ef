"""The config of a model, without its weights."""

from __future__ import annotations

import re
import struct
from typing import Any

from strategies.models.gguf import unpacked
from strategies.models.location import resolve_model_location

__all__ = ["from_folder", "learned_positions", "load_config", "model_class"]

POSITIONS = re.compile(r"pos|wpe")
"""Part of the name of a position embedding."""
SPARE = 4
"""Maximum extra rows of a position embedding: OPT's has 2."""


def load_config(cfg: Any, key: str = "base_model") -> Any:
    """Load the config of the model `cfg.<key>`, without its weights, with the overrides of the policy.

    Raises:
        ValueError: if no config can be loaded, or an override names a value that it doesn't have.
    """
    from transformers import AutoConfig

    location = resolve_model_location(getattr(cfg, key), key=key)
    is_base = key == "base_model"
    source = location
    if is_base and cfg.base_model_config is not None:
        source = resolve_model_location(cfg.base_model_config, key="base_model_config")
    # The revision is one of `base_model`'s repository, and names nothing in that of `base_model_config`.
    revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model and is_base and source is location else {}
    try:
        local = unpacked(source, "config")
        config = AutoConfig.from_pretrained(local.path, trust_remote_code=cfg.trust_remote_code, **local.kwargs, **revision)
    except (OSError, ValueError, KeyError, struct.error) as error:  # struct.error: not a GGUF file
        raise ValueError(f"{source.key}: no model config could be loaded from {source.given!r}: {error}") from error
    for name, value in ((cfg.overrides_of_model_config or {}) if is_base else {}).items():
        # A misspelt name would become a new attribute that no model reads.
        if not hasattr(config, name):
            raise ValueError(f"overrides_of_model_config.{name}: the config of {location.given!r} has no such value")
        setattr(config, name, value)
    return config


def model_class(config: Any) -> Any:
    """Return the auto class of a config's model: of vision-language models, or of causal language models."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    with_pictures = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_pictures else AutoModelForCausalLM


def from_folder(path: str, **kwargs: Any) -> Any:
    """Load a model by `from_pretrained` of the auto class that its config names; `kwargs` are that function's."""
    from transformers import AutoConfig

    config = kwargs.get("config")
    if config is None:
        names = ("trust_remote_code", "revision", "gguf_file")
        config = AutoConfig.from_pretrained(path, **{name: kwargs[name] for name in names if name in kwargs})
    return model_class(config).from_pretrained(path, **kwargs)


def learned_positions(config: Any) -> int | None:
    """Return the size of a model's learned position embedding; None if it has none, as with RoPE or ALiBi.

    A config states the number of positions whether they are learned or not. So a model without weights is built to look for
    the embedding, unless the config has RoPE or ALiBi.
    """
    text_config = config.get_text_config()
    if getattr(text_config, "rope_parameters", None) or getattr(text_config, "alibi", False):
        return None
    most = getattr(text_config, "max_position_embeddings", None)
    return most if most is None or _has_table(config, most) else None


def _has_table(config: Any, positions: int) -> bool:
    """Return whether the model has a tensor with a row per position; True if it can't be built."""
    import torch

    # Without an answer transformers would ask the user; a config class of remote code was loaded because they trust it.
    trusted = type(config).__module__.startswith("transformers_modules")
    try:
        with torch.device("meta"):
            model = model_class(config).from_config(config, trust_remote_code=trusted)
    except (ValueError, KeyError, ImportError, RuntimeError):
        # The cautious answer: without the check a longer row would fail in the middle of a run, by an index out of range.
        return True
    rows = range(positions, positions + SPARE + 1)
    tensors = (*model.named_parameters(), *model.named_buffers())
    return any(POSITIONS.search(name) and tensor.ndim == 2 and len(tensor) in rows for name, tensor in tensors)
