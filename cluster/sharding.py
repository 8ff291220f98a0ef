"""`deepspeed:` and `fsdp_config:` as plain dicts: the trainer's arguments, and their checks.

A stage is named (`deepspeed: zero2`), or configured in DeepSpeed's format: a JSON file or a mapping. Values that follow from
other keys of a recipe (batch sizes, clipping, precision, the optimizer) are "auto".
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

__all__ = [
    "STAGES",
    "ClusterSection",
    "FsdpConfig",
    "Sharding",
    "find_problems",
    "is_own",
    "precision_asked",
    "sharding_arguments",
    "sharding_of",
]

Sharding = Literal["zero1", "zero2", "zero3", "fsdp2"]
STAGES = ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload")
"""Stages that `deepspeed:` accepts."""
FOLLOWING: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    # The recipe's optimizer is torch's: DeepSpeed requires it to be allowed, also where its state is offloaded.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""Defaults of a mapping."""
DERIVED = {
    "train_batch_size": "micro_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""DeepSpeed keys -> the recipe's keys that determine them."""
KNOWN = {
    *FOLLOWING,
    *DERIVED,
    *("zero_optimization", "optimizer", "scheduler", "communication_data_type", "data_types", "prescale_gradients"),
    *("gradient_predivide_factor", "activation_checkpointing", "aio", "comms_logger", "compile", "disable_allgather"),
    *("dump_state", "flops_profiler", "log_level", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"),
    *("tensorboard", "csv_monitor", "wandb", "timers", "disable_python_gc", "gradient_allreduce_op"),
}
"""DeepSpeed keys that have an effect here; DeepSpeed itself ignores unknown ones."""
STEPPED_AT_ONCE = 4_000_000
"""Weights of a worker that ZeRO-3's optimizer updates at a time. It copies their gradients first: with DeepSpeed's default,
10^9, that is a copy of all gradients for most models."""
FSDP_ARGUMENTS = {
    "activation_checkpointing": "activation_checkpointing",
    "offload_params": "cpu_offload",
    "state_dict_type": "state_dict_type",
    "auto_wrap_policy": "auto_wrap_policy",
    "transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "min_num_params": "min_num_params",
    "reshard_after_forward": "reshard_after_forward",
}
"""Axolotl's key -> key of `fsdp_config` in transformers' arguments."""


class ClusterSection(BaseModel):
    """A section of this package's keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FsdpConfig(ClusterSection):
    """The `fsdp_config:` section, by Axolotl's keys."""

    fsdp_version: int = Field(2, description="2; version 1 is not supported.")
    activation_checkpointing: bool | None = Field(None, description="Recompute activations of wrapped layers.")
    offload_params: bool | None = Field(None, description="Keep parameters and gradients in host memory.")
    cpu_ram_efficient_loading: bool | None = Field(None, description="Only rank 0 loads the weights.")
    cpu_offload_pin_memory: bool | None = Field(None, description="Pin host memory for offloading.")
    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = Field(None, description="Checkpoints.")
    final_state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = Field(None, description="Result.")
    auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"] | None = Field(None, description="Wrapping.")
    transformer_layer_cls_to_wrap: str | None = Field(None, description="Layer class that is wrapped.")
    min_num_params: PositiveInt | None = Field(None, description="Smallest module that SIZE_BASED_WRAP wraps.")
    reshard_after_forward: bool | None = Field(None, description="Free gathered parameters after the forward.")
    mixed_precision_policy: str | None = Field(None, description="Precision of parameters and reductions.")


class ShardedConfig(Protocol):
    """The part of a config that determines how its model is sharded."""

    @property
    def deepspeed(self) -> str | dict[str, Any] | None: ...

    @property
    def fsdp_config(self) -> FsdpConfig | None: ...

    @property
    def num_workers(self) -> int: ...

    @property
    def min_workers(self) -> int: ...


def sharding_of(cfg: ShardedConfig) -> Sharding | None:
    """Return how the model of a valid config is sharded; None under DDP."""
    if cfg.fsdp_config is not None:
        return "fsdp2"
    if cfg.deepspeed is None:
        return None
    return f"zero{zero_stage(_read(cfg.deepspeed))}"  # type: ignore[return-value]


def sharding_arguments(cfg: ShardedConfig) -> dict[str, Any]:
    """Return additional training arguments: `deepspeed`, or `fsdp` and `fsdp_config`; none under DDP."""
    if cfg.fsdp_config is not None:
        return {"fsdp": True, "fsdp_config": _fsdp_arguments(cfg.fsdp_config)}
    if cfg.deepspeed is None:
        return {}
    return {"deepspeed": {**copy.deepcopy(FOLLOWING), **_read(cfg.deepspeed)}}


def precision_asked(cfg: ShardedConfig) -> dict[str, bool]:
    """Return `bf16` and `fp16` of the DeepSpeed config, without those that are "auto"."""
    config = _read(cfg.deepspeed) if cfg.deepspeed is not None else {}
    sections = {name: config[name] for name in ("bf16", "fp16") if isinstance(config.get(name), Mapping)}
    return {name: section["enabled"] for name, section in sections.items() if section.get("enabled", "auto") != "auto"}


def is_own(cfg: ShardedConfig) -> bool:
    """Return whether the recipe has a custom sharding config, which only DeepSpeed or the model can validate."""
    if cfg.fsdp_config is not None:
        return cfg.fsdp_config.transformer_layer_cls_to_wrap is not None
    # Named stages need no check; that of other configs imports DeepSpeed.
    return cfg.deepspeed is not None and cfg.deepspeed not in STAGES


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config."""
    return config["zero_optimization"]["stage"]


def find_problems(cfg: ShardedConfig) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for every problem of the two keys."""
    if cfg.deepspeed is None and cfg.fsdp_config is None:
        return
    if cfg.deepspeed is not None and cfg.fsdp_config is not None:
        yield "fsdp_config", "contradicts deepspeed; keep one of them"
    name = "deepspeed" if cfg.deepspeed is not None else "fsdp_config"
    if cfg.num_workers == 1:
        yield name, "divides a model among workers, and this run has one; set ray.num_workers, or remove it"
    elif cfg.min_workers == 1:
        yield "ray.num_workers", f"{name} divides a model among workers; set min to 2 or more (got 1), or remove {name}"
    if cfg.deepspeed is not None:
        yield from _deepspeed_problems(cfg.deepspeed)
    if cfg.fsdp_config is not None:
        yield from _fsdp_problems(cfg.fsdp_config)


def _preset(name: str) -> dict[str, Any]:
    """Return the config of a named stage: buckets of hidden_size squared, communication overlapped with computation."""
    stage = int(name.removesuffix("_offload").removeprefix("zero"))
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        # transformers fills such values in from the model's hidden_size.
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        zero["sub_group_size"] = STEPPED_AT_ONCE
        zero["stage3_prefetch_bucket_size"] = "auto"
        zero["stage3_param_persistence_threshold"] = "auto"
        # Without it accelerate refuses to gather the weights of a partitioned model, which is saved whole.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if name.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}


def _read(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed config that `deepspeed:` stands for.

    Raises:
        ValueError: for a name that is neither a stage nor a file, or a file that holds no mapping.
    """
    if isinstance(value, Mapping):
        return copy.deepcopy(dict(value))
    if value in STAGES:
        return _preset(value)
    path = Path(os.path.expanduser(value))
    if not path.is_file():
        raise ValueError(_unknown(value))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{value!r} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{value!r} holds no mapping of DeepSpeed's keys, but a {type(config).__name__}")
    return config


def _unknown(value: str) -> str:
    stages = ", ".join(STAGES)
    if "/" not in value and not value.endswith(".json"):
        return f"unknown stage {value!r}; available: {stages}, or the path of a JSON file"
    stem = Path(value).stem
    named = stem if stem in STAGES else stem.removesuffix("_bf16")
    advice = f"write `deepspeed: {named}` for the stage of that name" if named in STAGES else f"built in: {stages}"
    return f"there is no file {value!r}; {advice}"


def _deepspeed_problems(value: str | Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    try:
        config = _read(value)
    except ValueError as error:
        yield "deepspeed", str(error)
        return
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, Mapping) else None
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        yield "deepspeed.zero_optimization.stage", f"must be 1, 2 or 3, got {stage!r}; remove deepspeed to train under DDP"
    for name, source in DERIVED.items():
        if config.get(name, "auto") != "auto":
            yield f"deepspeed.{name}", f"follows from {source}; write auto, or remove it (got {config[name]!r})"
    for section, key in (("optimizer", "optimizer"), ("scheduler", "lr_scheduler")):
        if section in config:
            yield f"deepspeed.{section}", f"the recipe's own key `{key}` decides; remove the section"
    for name in config.keys() - KNOWN:
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.6)
        advice = f"did you mean {near[0]!r}?" if near else "remove it"
        yield f"deepspeed.{name}", f"no key of DeepSpeed's that means something here; {advice}"


def _fsdp_arguments(config: FsdpConfig) -> dict[str, Any]:
    values = {argument: getattr(config, name) for name, argument in FSDP_ARGUMENTS.items()}
    return {"version": 2, **{name: value for name, value in values.items() if value is not None}}


def _fsdp_problems(config: FsdpConfig) -> Iterator[tuple[str, str]]:
    if config.fsdp_version != 2:
        yield "fsdp_config.fsdp_version", f"only FSDP2 is supported; write 2, got {config.fsdp_version}"
    if config.mixed_precision_policy is not None:
        yield "fsdp_config.mixed_precision_policy", "follows from bf16 and fp16; remove it"
    if config.final_state_dict_type == "SHARDED_STATE_DICT":
        yield (
            "fsdp_config.final_state_dict_type",
            "the trained model is always written whole, as FULL_STATE_DICT; remove it (state_dict_type is for checkpoints)",
        )
    if config.state_dict_type == "FULL_STATE_DICT":
        yield (
            "fsdp_config.state_dict_type",
            "checkpoints hold each worker's part, as SHARDED_STATE_DICT; remove it (the trained model is written whole)",
        )
    if config.cpu_ram_efficient_loading:
        yield "fsdp_config.cpu_ram_efficient_loading", "is not supported: every worker loads the weights; remove it"
    if config.cpu_offload_pin_memory is False:
        yield "fsdp_config.cpu_offload_pin_memory", "is not supported: offloaded weights are pinned; remove it"
    if config.auto_wrap_policy == "SIZE_BASED_WRAP":
        yield (
            "fsdp_config.auto_wrap_policy",
            "SIZE_BASED_WRAP isn't supported: models are wrapped by layer; write TRANSFORMER_BASED_WRAP, or remove it",
        )
    if config.min_num_params is not None:
        yield "fsdp_config.min_num_params", "belongs to SIZE_BASED_WRAP, which isn't supported; remove it"
