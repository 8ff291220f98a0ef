"""Loading the policy and its adapter."""

from __future__ import annotations

import struct
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from strategies.gguf import make_plain, unpacked
from strategies.locations import resolve_model_location

__all__ = [
    "build_peft_config",
    "continue_adapter",
    "load_config",
    "load_model",
    "match_adapter_dtype",
    "disable_own_dropout",
    "restore_adapter_dropout",
]

# config key -> field of LoraConfig
LORA_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "peft_layer_replication": "layer_replication",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_ensure_weight_tying": "ensure_weight_tying",
}


def load_model(cfg: Any, tokenizer: Any = None, key: str = "base_model") -> PreTrainedModel:
    """Load the causal language model that `cfg.<key>` names, in float32 unless the config says otherwise.

    GGUF weights become plain tensors, so the model trains and saves like any other. The embeddings grow to the
    tokenizer's size where tokens were added; `model.embeddings_grew` says so.

    Raises:
        ValueError: when no model can be loaded from the given place, or weights are missing there.
    """
    location = resolve_model_location(getattr(cfg, key), key=key)
    is_base = key == "base_model"
    kwargs: dict[str, Any] = {
        "dtype": _dtype(cfg),
        "trust_remote_code": cfg.trust_remote_code,
        **({"attn_implementation": cfg.attn_implementation} if cfg.attn_implementation else {}),
        **({"revision": cfg.revision_of_model} if cfg.revision_of_model and is_base else {}),
        **_quantization(cfg),
        **(cfg.overrides_of_model_kwargs or {}),
    }
    if is_base and (cfg.base_model_config is not None or cfg.overrides_of_model_config):
        kwargs["config"] = load_config(cfg)
    try:
        source = unpacked(location, "weights")
        kwargs |= source.kwargs
        model, report = AutoModelForCausalLM.from_pretrained(source.path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, struct.error) as error:  # the last for a file that is no GGUF
        raise ValueError(f"{key}: no model could be loaded from {location.given!r}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would draw them at random and go on.
        lacks = f"{location.given!r} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        raise ValueError(f"{key}: {lacks}; give a complete model")
    if source.is_gguf:
        make_plain(model)
    model.name_or_path = location.given
    model.embeddings_grew = tokenizer is not None and _grow_embeddings(model, len(tokenizer), cfg)
    return model


def build_peft_config(cfg: Any, model: PreTrainedModel) -> LoraConfig:
    """Return the LoRA config of a new adapter: every linear layer but the output head, unless others are named."""
    given = {field: getattr(cfg, name) for name, field in LORA_FIELDS.items() if getattr(cfg, name) is not None}
    if isinstance(given.get("target_parameters"), str):
        given["target_parameters"] = [given["target_parameters"]]
    if "target_parameters" not in given:
        given.setdefault("target_modules", "all-linear")
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, **given})


def continue_adapter(cfg: Any, model: PreTrainedModel) -> PeftModel:
    """Load the adapter in `lora_model_dir` onto `model` to train it further.

    Raises:
        ValueError: when the folder holds no adapter, or one of another shape.
    """
    autocast = cfg.peft_autocast_adapter_dtype
    kwargs = {} if autocast is None else {"autocast_adapter_dtype": autocast}
    try:
        return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"lora_model_dir: no adapter could be loaded from {cfg.lora_model_dir!r}: {error}") from error


def disable_own_dropout(model: Any) -> None:
    """Turn off the dropout that modules apply themselves, by a rate that they keep (`attention_dropout`, OPT's `dropout`).

    TRL's `disable_dropout` sees modules of type `Dropout` only.
    """
    for module in model.modules():
        for name, rate in list(vars(module).items()):
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)


def restore_adapter_dropout(model: Any) -> None:
    """Give the trained adapter its own dropout back, which `disable_dropout` has set to 0 with the base model's.

    Dropout in policy and reference blurs their ratio, hence the default of 0; `lora_dropout` that is set in the config
    is a decision, and the adapter is the one part where the reference has none.
    """
    if not isinstance(model, PeftModel):
        return
    rate = getattr(model.peft_config[model.active_adapter], "lora_dropout", 0.0)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        if rate and model.active_adapter in dropouts:
            dropouts[model.active_adapter].p = rate


def match_adapter_dtype(model: Any) -> None:
    """Cast a new adapter to the base model's dtype (`peft_autocast_adapter_dtype: false`); PEFT makes it float32."""
    if isinstance(model, PeftModel):
        for param in model.parameters():
            if param.requires_grad:
                param.data = param.data.to(model.get_base_model().dtype)


def _dtype(cfg: Any) -> torch.dtype:
    half = cfg.bf16 == "full" or cfg.load_in_4bit or cfg.load_in_8bit
    return torch.bfloat16 if half else torch.float32


def _quantization(cfg: Any) -> dict[str, Any]:
    extra = cfg.bnb_config_kwargs or {}
    if cfg.load_in_8bit:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, **extra)}
    if cfg.load_in_4bit:
        defaults = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "bnb_4bit_quant_storage": torch.bfloat16,
        }
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **{**defaults, **extra})}
    return {}


def load_config(cfg: Any, key: str = "base_model") -> Any:
    """Load the config of the model that `cfg.<key>` names, without its weights, with the overrides that the policy gets.

    Raises:
        ValueError: when no config can be loaded from there, or an override names a value that it doesn't have.
    """
    location = resolve_model_location(getattr(cfg, key), key=key)
    is_base = key == "base_model"
    source = location
    if is_base and cfg.base_model_config is not None:
        source = resolve_model_location(cfg.base_model_config, key="base_model_config")
    revision = {"revision": cfg.revision_of_model} if cfg.revision_of_model and is_base and source is location else {}
    try:
        found = unpacked(source, "config")
        config = AutoConfig.from_pretrained(found.path, trust_remote_code=cfg.trust_remote_code, **found.kwargs, **revision)
    except (OSError, ValueError, KeyError, struct.error) as error:  # the last for a file that is no GGUF
        raise ValueError(f"{source.key}: no model config could be loaded from {source.given!r}: {error}") from error
    for name, value in ((cfg.overrides_of_model_config or {}) if is_base else {}).items():
        if not hasattr(config, name):
            raise ValueError(f"overrides_of_model_config.{name}: the config of {location.given!r} has no such value")
        setattr(config, name, value)
    return config


def _grow_embeddings(model: PreTrainedModel, size: int, cfg: Any) -> bool:
    """Grow (never shrink: some models pad their vocabulary) the embeddings to `size` tokens."""
    if size <= model.get_input_embeddings().num_embeddings:
        return False
    # New rows are drawn at random; every rank and every run must draw the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model.resize_token_embeddings(size, pad_to_multiple_of=32 if cfg.resize_token_embeddings_to_32x else None)
    return True
