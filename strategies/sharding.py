"""Sharded training: what a process does beside handing DeepSpeed's or FSDP2's dict to the trainer's arguments.

The dicts come from outside (`{"deepspeed": {...}}`, or `{"fsdp": True, "fsdp_config": {...}}`) and say nothing about the
machine. This module alone knows whether there is a GPU: with one, collectives are NCCL's and offloaded state goes to the
host; without one, they are gloo's and there is nothing to offload from.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from pydantic import ValidationError
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from strategies.deepspeed_patches import keep_float32_weights_once, talk_through_gloo
from strategies.models import load_config
from strategies.precision import computes_in_bf16

__all__ = ["accumulate_outside", "arguments_here", "divided_loading", "find_problems", "fsdp_on_any_device"]


def find_problems(cfg: Any, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (path, message) for what every worker would find wrong: keys of DeepSpeed's, classes that the model doesn't have.

    Args:
        cfg: a validated config, whose model's own config can be read.
        arguments: DeepSpeed's or FSDP2's dict.
    """
    if "deepspeed" in arguments:
        yield from _zero_problems(arguments["deepspeed"]["zero_optimization"])
    layers = arguments.get("fsdp_config", {}).get("transformer_layer_cls_to_wrap")
    if layers is not None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(cfg), trust_remote_code=cfg.trust_remote_code)
        classes = {type(module).__name__ for module in model.modules()}
        for name in (one.strip() for one in layers.split(",")):
            if name not in classes:
                its_own = ", ".join(sorted(set(model._no_split_modules or ()) & classes))
                yield (
                    "fsdp_config.transformer_layer_cls_to_wrap",
                    f"{cfg.base_model} has no layer of class {name!r}; write {its_own}, or remove it",
                )


def _zero_problems(zero: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not torch.accelerator.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{name: value for name, value in zero.items() if value != "auto"})
    except ValidationError as error:
        for one in error.errors():
            path = ".".join(["deepspeed", "zero_optimization", *map(str, one["loc"])])
            if one["type"] != "extra_forbidden":
                yield path, f"{one['msg'].replace('Input should be', 'must be')}, got {one['input']!r}"
                continue
            near = difflib.get_close_matches(str(one["loc"][-1]), DeepSpeedZeroConfig.model_fields, n=1, cutoff=0.6)
            yield path, f"no key of DeepSpeed's; {f'did you mean {near[0]!r}?' if near else 'remove it'}"


@contextmanager
def divided_loading(cfg: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Load models within this context: under ZeRO-3 each worker keeps its part of a weight, and nobody ever holds them all.

    Every worker enters it before its first model and leaves it before the trainer's arguments are made.

    Args:
        cfg: a validated config; where it computes in bfloat16, DeepSpeed's weights are bfloat16.
        arguments: DeepSpeed's or FSDP2's dict; an empty one changes nothing.
    """
    forget()
    config = arguments.get("deepspeed")
    if config is None:
        yield
        return
    _start_deepspeed()
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        yield
        return
    kept = {name: value for name, value in _without_offload(zero).items() if value != "auto"}
    # transformers finds it through a weak reference: it lives as long as this frame.
    held = HfDeepSpeedConfig(
        {"zero_optimization": kept, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": computes_in_bf16(cfg)}}
    )
    try:
        yield
    finally:
        forget()
        del held


def arguments_here(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as this machine can have them; what an earlier run of this process has told transformers is forgotten."""
    forget()
    found = copy.deepcopy(dict(arguments))
    if "deepspeed" in found:
        _start_deepspeed()
        found["deepspeed"]["zero_optimization"] = _without_offload(found["deepspeed"]["zero_optimization"])
    if "fsdp_config" in found and not torch.accelerator.is_available():
        found["fsdp_config"].pop("cpu_offload", None)
    return found


def forget() -> None:
    """Undo what earlier trainers of this process have left: transformers a config in a global, accelerate variables."""
    unset_hf_deepspeed_config()
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(name, None)


def accumulate_outside(args: Any) -> None:
    """Tell DeepSpeed that a step is one batch: the trainer adds up gradients itself and says which backward pass is the last.

    Args:
        args: of the trainer, with or without DeepSpeed.
    """
    if args.deepspeed:
        config = args.hf_deepspeed_config.config
        config["gradient_accumulation_steps"] = 1
        config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * args.world_size


@contextmanager
def fsdp_on_any_device() -> Iterator[None]:
    """Let an `Accelerator` that is made within this context shard by FSDP2 on CPUs too, and keep float32 where it matters.

    accelerate 1.15.0 takes an `fsdp_plugin` only where it has found GPUs or the like, and goes on with DDP elsewhere without a
    word (`AcceleratorState.__init__`). All that follows works on any device, so the two values that it leaves out are set.
    With bfloat16 it would also round what the model returns, log-probabilities among it, and add gradients up in bfloat16.
    """
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is None:
            return
        if self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if plugin.mixed_precision_policy is not None:
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def _start_deepspeed() -> None:
    """Let DeepSpeed know the process group, or make one, before anything is divided: it would divide among one process."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if backend == "gloo":
        talk_through_gloo()
    deepspeed.init_distributed(backend, auto_mpi_discovery=False)
    keep_float32_weights_once()


def _without_offload(zero: Mapping[str, Any]) -> dict[str, Any]:
    """The section without what moves state to the host, where all of it is there already."""
    if torch.accelerator.is_available():
        return dict(zero)
    return {name: value for name, value in zero.items() if name not in ("offload_optimizer", "offload_param")}
