"""Sharded training: set-up of a process beside DeepSpeed's or FSDP2's dict in the trainer's arguments.

The caller's dicts (`{"deepspeed": {...}}`, or `{"fsdp": True, "fsdp_config": {...}}`) are independent of the machine. This
module adapts them: with a GPU, collectives use NCCL and state can be offloaded to the host; without one, they use gloo, and
offloading is dropped.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import ValidationError
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from strategies.compat import keep_float32_weights_once, talk_through_gloo, unsplit_layers
from strategies.models.config import load_config, model_class
from strategies.models.precision import computes_in_bf16

__all__ = ["disable_engine_accumulation", "find_problems", "localize_arguments", "zero3_init_context"]


def find_problems(cfg: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for unknown keys of DeepSpeed's, and layer classes that the model doesn't have.

    Args:
        cfg: a validated config, whose model's own config can be read.
        arguments: DeepSpeed's or FSDP2's dict.
    """
    if "deepspeed" in arguments:
        yield from _zero_problems(arguments["deepspeed"]["zero_optimization"])
    layers = arguments.get("fsdp_config", {}).get("transformer_layer_cls_to_wrap")
    if layers is not None:
        with torch.device("meta"):
            config = load_config(cfg)
            model = model_class(config).from_config(config, trust_remote_code=cfg.trust_remote_code)
        classes = {type(module).__name__ for module in model.modules()}
        for name in (part.strip() for part in layers.split(",")):
            if name not in classes:
                candidates = ", ".join(sorted(unsplit_layers(model) & classes))
                yield (
                    "fsdp_config.transformer_layer_cls_to_wrap",
                    f"{cfg.base_model} has no layer of class {name!r}; write {candidates}, or remove it",
                )


def _zero_problems(zero: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not torch.accelerator.is_available():
        # Before DeepSpeed's first use of an accelerator, after which it keeps its choice.
        os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValidationError as error:
        for detail in error.errors():
            path = ".".join(["deepspeed", "zero_optimization", *map(str, detail["loc"])])
            if detail["type"] != "extra_forbidden":
                yield path, f"{detail['msg'].replace('Input should be', 'must be')}, got {detail['input']!r}"
                continue
            near = difflib.get_close_matches(str(detail["loc"][-1]), DeepSpeedZeroConfig.model_fields, n=1, cutoff=0.6)
            yield path, f"no key of DeepSpeed's; {f'did you mean {near[0]!r}?' if near else 'remove it'}"


@contextmanager
def zero3_init_context(cfg: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Context in which `from_pretrained` partitions weights under ZeRO-3, so no rank holds the full model.

    Every worker enters it before it loads its first model, and leaves it before it creates the trainer's arguments.

    Args:
        cfg: a validated config; if it computes in bfloat16, DeepSpeed's weights are bfloat16.
        arguments: DeepSpeed's or FSDP2's dict; an empty one changes nothing.
    """
    # An earlier trainer of this process may have left ZeRO-3 on, under which `from_pretrained` partitions.
    reset_global_state()
    config = arguments.get("deepspeed")
    if config is None:
        yield
        return
    _start_deepspeed()
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        yield
        return
    # transformers resolves `auto` from the trainer's arguments, which don't exist yet; DeepSpeed's defaults stand for it.
    kept = {name: value for name, value in _without_offload(zero).items() if value != "auto"}
    # transformers keeps only a weak reference, so the object must live as long as this frame.
    # DeepSpeed refuses a config without a batch size, though partitioning doesn't read it.
    ds_config = HfDeepSpeedConfig(
        {"zero_optimization": kept, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": computes_in_bf16(cfg)}}
    )
    try:
        yield
    finally:
        reset_global_state()
        del ds_config


def localize_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments adapted to this machine, and reset the global state of earlier trainers."""
    reset_global_state()
    # A deep copy: transformers writes its defaults into `fsdp_config`.
    local = copy.deepcopy(dict(arguments))
    if "deepspeed" in local:
        _start_deepspeed()
        local["deepspeed"]["zero_optimization"] = _without_offload(local["deepspeed"]["zero_optimization"])
    if "fsdp_config" in local and not torch.accelerator.is_available():
        local["fsdp_config"].pop("cpu_offload", None)
    return local


def reset_global_state() -> None:
    """Clear the state of earlier trainers in this process: transformers' global config, accelerate's variables."""
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)


def disable_engine_accumulation(args: Any) -> None:
    """Disable DeepSpeed's gradient accumulation: the trainer accumulates, and marks the last backward pass of a step.

    Args:
        args: of the trainer, with or without DeepSpeed.
    """
    if args.deepspeed:
        config = args.hf_deepspeed_config.config
        config["gradient_accumulation_steps"] = 1
        # DeepSpeed asserts that this is the product of the other two and the number of processes.
        config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * args.world_size


def _start_deepspeed() -> None:
    """Initialise DeepSpeed's process group before weights are partitioned: it would partition among one process."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if backend == "gloo":
        # Before `init_distributed`, which loads those collectives.
        talk_through_gloo()
    # No discovery: where a launcher's variables are missing, DeepSpeed would import mpi4py.
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
    keep_float32_weights_once()


def _without_offload(zero: Mapping[str, Any]) -> dict[str, Any]:
    """Drop offloading from the section if there is no accelerator to offload from."""
    if torch.accelerator.is_available():
        return dict(zero)
    return {name: value for name, value in zero.items() if name not in ("offload_optimizer", "offload_param")}
