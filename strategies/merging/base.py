"""The base model of an adapter, in float32, and the dtypes that its weights are stored in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from strategies.models.config import load_config, model_class
from strategies.models.loading import load_model
from strategies.models.location import resolve_model_location

__all__ = ["float_tensors", "load_base", "memory_needed"]

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
"""Whole or in parts; files of a variant, such as `model.fp16.safetensors`, hold the same tensors again."""
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")
"""What safetensors calls the other dtypes of a model that isn't quantized."""
ON_DISK = ("revision", "cache_dir", "token", "local_files_only")
"""Arguments of `from_pretrained` that only say where files come from."""
IN_MEMORY = (
    "attn_implementation",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "quantization_config",
    "torch_dtype",
)
"""Those that only say how the model is held and computed."""


def memory_needed(cfg: Any, tokens: int) -> int:
    """Return the bytes of the base model in float32, and of logits for `tokens` tokens. Raises ValueError as `load_config`."""
    config = load_config(cfg)
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=bool(cfg.trust_remote_code))
    head = model.get_output_embeddings()
    # A tied head is counted once, and needs memory of its own while the adapter is merged.
    untied = head.weight.numel() if head is not None and getattr(config.get_text_config(), "tie_word_embeddings", False) else 0
    return 4 * (model.num_parameters() + untied + tokens * config.get_text_config().vocab_size)


def load_base(cfg: Any) -> tuple[Any, dict[str, torch.dtype]]:
    """Load `cfg.base_model` on the CPU in float32; returns it with the dtype that each floating-point tensor is stored in.

    Raises:
        ValueError: when there is no model, it is incomplete or damaged, or it is stored quantized.
    """
    location, config = resolve_model_location(cfg.base_model), load_config(cfg)
    if not location.is_gguf and (quantized := getattr(config, "quantization_config", None)):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        raise ValueError(
            f"base_model: {location.given!r} is stored quantized ({method}), and a sum with an adapter would have to be "
            "quantized again; give the model that it was made from with --base"
        )
    kwargs = {name: value for name, value in (cfg.overrides_of_model_kwargs or {}).items() if name not in IN_MEMORY}
    # What a recipe sets for training would round the weights as they are loaded.
    off = {"load_in_4bit": False, "load_in_8bit": False, "bnb_config_kwargs": None, "bf16": False, "attn_implementation": None}
    try:
        model = load_model(cfg.model_copy(update={**off, "overrides_of_model_kwargs": kwargs or None}))
    # The message on other shapes is replaced: it advises `ignore_mismatched_sizes`, which draws them at random.
    except (RuntimeError, SafetensorError) as error:
        why = "its weights have other shapes than its config wants" if "mismatched_sizes" in str(error) else error
        raise ValueError(f"base_model: no model could be loaded from {location.given!r}: {why}") from error
    if location.is_gguf:
        return model, {name: torch.float32 for name, _ in float_tensors(model)}
    stored: dict[str, torch.dtype] = {}
    if not set(kwargs) - set(ON_DISK):  # with others, such as `variant`, only transformers knows which files they are
        revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model else {}
        stored = _stored_dtypes(Path(cached_file(location.path, "config.json", **{**revision, **kwargs})).parent)
    return model, _dtypes(model, stored, getattr(config, "dtype", None) or torch.float32)


def float_tensors(model: Any) -> list[tuple[str, torch.Tensor]]:
    """List the floating-point tensors of a model's files, a tied one under each of its names."""
    return [(name, each) for name, each in model.state_dict(keep_vars=True).items() if each.is_floating_point()]


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """The dtype of each floating-point tensor in a model's safetensors files. Raises ValueError for quantized ones."""
    found: dict[str, torch.dtype] = {}
    # All parts of a model that is stored in several; an adapter's file has another name.
    for file in filter(lambda file: WEIGHTS.fullmatch(file.name), folder.iterdir()):
        with safe_open(file, "pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 - no mapping
        if quantized := [name for name, kind in kinds.items() if kind not in FLOATS and kind not in INTEGERS]:
            raise ValueError(
                f"base_model: {quantized[0]} in {str(file)!r} has the dtype {kinds[quantized[0]]}, of quantized weights, with "
                "which an adapter can't be merged; give the model that it was made from with --base"
            )
        found |= {name: FLOATS[kind] for name, kind in kinds.items() if kind in FLOATS}
    return found


def _dtypes(model: Any, stored: dict[str, torch.dtype], default: torch.dtype) -> dict[str, torch.dtype]:
    """The same by the names that the model gives its tensors."""
    if len(kinds := set(stored.values())) == 1:
        default, stored = kinds.pop(), {}
    found: dict[int, torch.dtype] = {}
    for name, tensor in float_tensors(model) if stored else ():
        # The names alone are wanted: on the meta device nothing is computed.
        in_files = revert_weight_conversion(model, {name: torch.empty(tensor.shape, device="meta")})
        if (known := next((each for each in in_files if each in stored), None)) is not None:
            found[id(tensor)] = stored[known]  # the files have one name of a tensor that is tied
    return {name: found.get(id(tensor), default) for name, tensor in float_tensors(model)}
