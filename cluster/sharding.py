"""`deepspeed:` and `fsdp_config:` as plain dicts: what the trainer's arguments take, and what is wrong with them.

A stage is named (`deepspeed: zero2`), or given as DeepSpeed writes it: a JSON file or a mapping. What follows from other keys
of a recipe (batch sizes, clipping, precision, the optimizer) is left to them as "auto".
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cluster.config import ClusterKeys, FsdpConfig

__all__ = [
    "STAGES",
    "Sharding",
    "find_problems",
    "is_own",
    "precision_asked",
    "sharding_arguments",
    "sharding_of",
]

Sharding = Literal["zero1", "zero2", "zero3", "fsdp2"]
STAGES = ("zero1", "zero2", "zero3", "zero1_offload", "zero2_offload", "zero3_offload")
"""Names that `deepspeed:` takes."""
FOLLOWING: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    # The recipe's optimizer is torch's own: DeepSpeed asks to be told that this is meant, also where its state is offloaded.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""What a mapping that doesn't say otherwise gets."""
DERIVED = {
    "train_batch_size": "micro_batch_size and gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}
"""Keys of DeepSpeed's that keys of the recipe decide."""
KNOWN = {
    *FOLLOWING,
    *DERIVED,
    *("zero_optimization", "optimizer", "scheduler", "communication_data_type", "data_types", "prescale_gradients"),
    *("gradient_predivide_factor", "activation_checkpointing", "aio", "comms_logger", "compile", "disable_allgather"),
    *("dump_state", "flops_profiler", "log_level", "memory_breakdown", "steps_per_print", "wall_clock_breakdown"),
    *("tensorboard", "csv_monitor", "wandb", "timers", "disable_python_gc", "gradient_allreduce_op"),
}
"""Keys of DeepSpeed's that mean something here; DeepSpeed itself passes over those that it doesn't know."""
STEPPED_AT_ONCE = 4_000_000
"""Weights of a worker that ZeRO-3's optimizer steps at a time. It copies their gradients first: DeepSpeed's own number, 10^9,
means a copy of all gradients for most models."""
FSDP_ARGUMENTS = {
    "activation_checkpointing": "activation_checkpointing",
    "offload_params": "cpu_offload",
    "state_dict_type": "state_dict_type",
    "auto_wrap_policy": "auto_wrap_policy",
    "transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "min_num_params": "min_num_params",
    "reshard_after_forward": "reshard_after_forward",
}
"""Axolotl's key -> that of the `fsdp_config` of transformers' arguments."""


def sharding_of(cfg: ClusterKeys) -> Sharding | None:
    """What is divided among the workers, as `find_problems` has found right; None under DDP, where nothing is."""
    if cfg.fsdp_config is not None:
        return "fsdp2"
    if cfg.deepspeed is None:
        return None
    return f"zero{zero_stage(_read(cfg.deepspeed))}"  # type: ignore[return-value]


def sharding_arguments(cfg: ClusterKeys) -> dict[str, Any]:
    """Further arguments of the trainer's arguments: `deepspeed`, or `fsdp` and `fsdp_config`; none under DDP."""
    if cfg.fsdp_config is not None:
        return {"fsdp": True, "fsdp_config": _fsdp_arguments(cfg.fsdp_config)}
    if cfg.deepspeed is None:
        return {}
    return {"deepspeed": {**copy.deepcopy(FOLLOWING), **_read(cfg.deepspeed)}}


def precision_asked(cfg: ClusterKeys) -> dict[str, bool]:
    """What DeepSpeed's own config says of `bf16` and `fp16`, where it doesn't leave them to the recipe."""
    config = _read(cfg.deepspeed) if cfg.deepspeed is not None else {}
    sections = {name: config[name] for name in ("bf16", "fp16") if isinstance(config.get(name), Mapping)}
    return {name: section["enabled"] for name, section in sections.items() if section.get("enabled", "auto") != "auto"}


def is_own(cfg: ClusterKeys) -> bool:
    """Whether the recipe brings something that only DeepSpeed, or the model, can tell whether it is right."""
    if cfg.fsdp_config is not None:
        return cfg.fsdp_config.transformer_layer_cls_to_wrap is not None
    return cfg.deepspeed is not None and cfg.deepspeed not in STAGES


def zero_stage(config: Mapping[str, Any]) -> int:
    """The stage of a config of DeepSpeed's."""
    return config["zero_optimization"]["stage"]


def find_problems(cfg: ClusterKeys) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for what is wrong with the two keys themselves."""
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
    """The config of a named stage: pieces of hidden_size squared are exchanged at a time, computing goes on meanwhile."""
    stage = int(name.removesuffix("_offload").removeprefix("zero"))
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
    }
    if stage == 3:
        zero["sub_group_size"] = STEPPED_AT_ONCE
        zero["stage3_prefetch_bucket_size"] = "auto"
        zero["stage3_param_persistence_threshold"] = "auto"
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if name.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}


def _read(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The mapping that `deepspeed:` stands for.

    Raises:
        ValueError: for a name that is no stage and no file, or a file that holds no mapping.
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
    given = {argument: getattr(config, name) for name, argument in FSDP_ARGUMENTS.items()}
    return {"version": 2, **{name: value for name, value in given.items() if value is not None}}


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
    if config.auto_wrap_policy == "SIZE_BASED_WRAP" and config.min_num_params is None:
        yield "fsdp_config.auto_wrap_policy", "SIZE_BASED_WRAP needs fsdp_config.min_num_params"
    if config.auto_wrap_policy != "SIZE_BASED_WRAP" and config.min_num_params is not None:
        yield (
            "fsdp_config.min_num_params",
            "has no effect without auto_wrap_policy: SIZE_BASED_WRAP; remove it",
        )
