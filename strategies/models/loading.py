"""Loading the policy and its adapter."""

from __future__ import annotations

import struct
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel

from strategies.models.adapter_start import check_new, check_repeatable
from strategies.models.config import from_folder, load_config
from strategies.models.gguf import make_plain, unpacked
from strategies.models.location import resolve_model_location
from strategies.vision.modules import outside_tower

__all__ = [
    "build_peft_config",
    "check_adapter",
    "continue_adapter",
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
    """Load the model `cfg.<key>`, a causal language or a vision-language model by its config.

    In float32 unless the config sets another dtype.

    GGUF weights are dequantized, so the model trains and saves like any other. Embeddings are resized if tokens were
    added to the tokenizer; `model.embeddings_grew` is then True.

    Raises:
        ValueError: if no model can be loaded, or weights are missing.
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
    # The overrides are the policy's; a reference model has its own config.
    if is_base and (cfg.base_model_config is not None or cfg.overrides_of_model_config):
        kwargs["config"] = load_config(cfg)
    try:
        source = unpacked(location, "weights")
        kwargs |= source.kwargs
        model, report = from_folder(source.path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, struct.error) as error:  # struct.error: not a GGUF file
        raise ValueError(f"{key}: no model could be loaded from {location.given!r}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        # transformers would only warn and initialise them at random.
        lacks = f"{location.given!r} lacks {len(missing)} of the model's weights, such as {missing[0]}"
        raise ValueError(f"{key}: {lacks}; give a complete model")
    if source.is_gguf:
        make_plain(model)
    # PEFT writes this name into the adapter's config, and the weights may lie in a cached folder of a GGUF file.
    model.name_or_path = location.given
    model.embeddings_grew = tokenizer is not None and _grow_embeddings(model, len(tokenizer), cfg)
    return model


def check_adapter(cfg: Any) -> None:
    """Check that an adapter, new or in `lora_model_dir`, starts at the reference.

    Raises:
        ValueError: if it doesn't, or can't be loaded onto its base again.
    """
    if cfg.lora_model_dir is None:
        if cfg.adapter is not None and cfg.peft_init_lora_weights is not None:
            check_new(cfg.peft_init_lora_weights)
            try:
                check_repeatable(cfg.peft_init_lora_weights)
            except ValueError as error:
                raise ValueError(f"peft_{error}: nobody could load the model; write pissa, or true") from error
        return
    folder = resolve_model_location(cfg.lora_model_dir, "lora_model_dir").path
    try:
        config = PeftConfig.from_pretrained(folder)
        # Configs of other methods than LoRA have no such field.
        check_repeatable(getattr(config, "init_lora_weights", True))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"lora_model_dir: no adapter could be loaded from {cfg.lora_model_dir!r}: {error}") from error


def build_peft_config(cfg: Any, model: PreTrainedModel) -> LoraConfig:
    """Return the LoRA config of a new adapter: every linear layer but the output head, unless others are named.

    A tower of pictures is left out, unless a target names one of its modules.
    """
    fields = {field: getattr(cfg, name) for name, field in LORA_FIELDS.items() if getattr(cfg, name) is not None}
    if isinstance(fields.get("target_parameters"), str):
        # Unlike for modules, PEFT takes no single text for parameters.
        fields["target_parameters"] = [fields["target_parameters"]]
    # With `target_parameters` PEFT needs no modules: the default would put adapters on every linear layer as well.
    if "target_parameters" not in fields:
        fields.setdefault("target_modules", "all-linear")
    if "target_modules" in fields:
        fields["exclude_modules"] = outside_tower(model, fields["target_modules"])
    return LoraConfig(task_type="CAUSAL_LM", **{"r": 8, "lora_alpha": 16, **fields})


def continue_adapter(cfg: Any, model: PreTrainedModel) -> PeftModel:
    """Load the adapter in `lora_model_dir` onto `model` to train it further.

    Raises:
        ValueError: if the folder holds no adapter, one of another shape, or one that can't be continued.
    """
    check_adapter(cfg)
    autocast = cfg.peft_autocast_adapter_dtype
    kwargs = {} if autocast is None else {"autocast_adapter_dtype": autocast}
    folder = resolve_model_location(cfg.lora_model_dir, "lora_model_dir").path
    try:
        return PeftModel.from_pretrained(model, folder, is_trainable=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"lora_model_dir: no adapter could be loaded from {cfg.lora_model_dir!r}: {error}") from error


def disable_own_dropout(model: Any) -> None:
    """Disable functional dropout, whose rate is an attribute of a module (`attention_dropout`, OPT's `dropout`).

    TRL's `disable_dropout` finds only modules of type `Dropout`.
    """
    for module in model.modules():
        for name, rate in list(vars(module).items()):
            # By a part of the name, which also finds `layerdrop`, by which OPT skips whole layers.
            if "drop" in name and isinstance(rate, float):
                setattr(module, name, 0.0)


def restore_adapter_dropout(model: Any) -> None:
    """Restore the trained adapter's dropout, which `disable_dropout` has set to 0 with the base model's.

    Dropout in policy and reference adds noise to their ratio, hence the default of 0. `lora_dropout` is set explicitly, and
    affects only the adapter, which the reference doesn't have.
    """
    if not isinstance(model, PeftModel):
        return
    rate = getattr(model.peft_config[model.active_adapter], "lora_dropout", 0.0)
    for module in model.modules():
        dropouts = getattr(module, "lora_dropout", {})
        # Without a rate PEFT's module is an Identity, which has no `p`.
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
        # Axolotl's values: a recipe quantizes as it did there.
        defaults = {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
            "bnb_4bit_quant_storage": torch.bfloat16,
        }
        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **{**defaults, **extra})}
    return {}


def _grow_embeddings(model: PreTrainedModel, size: int, cfg: Any) -> bool:
    """Grow (never shrink: some models pad their vocabulary) the embeddings to `size` tokens; return whether they grew."""
    if size <= model.get_input_embeddings().num_embeddings:
        return False
    # New rows are random; every rank and every run must draw the same.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        model.resize_token_embeddings(size, pad_to_multiple_of=32 if cfg.resize_token_embeddings_to_32x else None)
    return True
