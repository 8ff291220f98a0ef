"""From config keys to the arguments of a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import DPOConfig, GRPOConfig, KTOConfig

from strategies.cadence import RunLength, cadence_arguments
from strategies.config.names import OWN_SCHEDULES
from strategies.losses import LossOptions
from strategies.trackers import tracker_arguments

__all__ = ["AxolotlDPOConfig", "AxolotlGRPOConfig", "AxolotlKTOConfig", "AxolotlTrainingMixins", "common_arguments"]

# Config keys that are arguments of the same meaning under this name; one that is not set keeps the argument's default.
SAME = {
    "micro_batch_size": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "seed": "seed",
    "full_determinism": "full_determinism",
    "pad_to_multiple_of": "pad_to_multiple_of",
    "output_dir": "output_dir",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "max_grad_norm": "max_grad_norm",
    "optim_target_modules": "optim_target_modules",
    "embedding_lr": "embedding_lr",
    "embedding_lr_scale": "embedding_lr_scale",
    "loraplus_lr_ratio": "loraplus_lr_ratio",
    "loraplus_lr_embedding": "loraplus_lr_embedding",
    "cosine_min_lr_ratio": "cosine_min_lr_ratio",
    "cosine_constant_lr_ratio": "cosine_constant_lr_ratio",
    "lr_scheduler_kwargs": "lr_scheduler_kwargs",
    "dataloader_num_workers": "dataloader_num_workers",
    "dataloader_prefetch_factor": "dataloader_prefetch_factor",
    "dataloader_drop_last": "dataloader_drop_last",
    "ddp_timeout": "ddp_timeout",
    "ddp_find_unused_parameters": "ddp_find_unused_parameters",
    "torch_empty_cache_steps": "torch_empty_cache_steps",
    "nonfinite_loss": "nonfinite_loss",
    "include_tokens_per_second": "include_num_input_tokens_seen",
    "save_only_model": "save_only_model",
    "save_total_limit": "save_total_limit",
    # transformers renamed these two; TRL turns the first on where it isn't given.
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "torch_compile": "torch_compile",
    "torch_compile_backend": "torch_compile_backend",
    "torch_compile_mode": "torch_compile_mode",
    "accelerator_config": "accelerator_config",
}


@dataclass
class AxolotlTrainingMixins:
    """Arguments of our own mixins, for every trainer."""

    alternate_lr_scheduler_type: str | None = None
    cosine_min_lr_ratio: float | None = None
    cosine_constant_lr_ratio: float | None = None
    embedding_lr: float | None = None
    embedding_lr_scale: float | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float | None = None
    lr_groups: list[dict[str, Any]] | None = None
    nonfinite_loss: str = "stop"
    """What is done at a step whose loss or gradient norm is not finite: stop or skip."""


@dataclass
class AxolotlDPOConfig(AxolotlTrainingMixins, DPOConfig):
    """Arguments of `AxolotlDPOTrainer`; `loss_type` may also be `simpo` or `orpo`, which need no reference."""

    nll_alpha: float = 0.0
    """Weight of the chosen completion's negative log-likelihood per token."""
    norm_loss: bool = False
    """Losses and rewards of log-probabilities per token."""
    simpo_gamma: float = LossOptions.gamma
    """SimPO's target margin of rewards."""
    loss_options: dict[str, Any] | None = None
    """`LossOptions.own`: what a strategy from outside hands to a loss of its own."""
    sample_packing: bool = True
    """Pack pairs into rows, each prompt once; False: padded batches of `per_device_train_batch_size` pairs."""
    tokens_per_forward: int | None = None
    """Most tokens of one packed row; None: twice `max_length`."""
    global_batch_size: int | None = None
    """Pairs of an optimizer step, over all workers; None: what the per-device size, accumulation and workers make."""


@dataclass
class AxolotlKTOConfig(AxolotlTrainingMixins, KTOConfig):
    """Arguments of `AxolotlKTOTrainer`."""


@dataclass
class AxolotlGRPOConfig(AxolotlTrainingMixins, GRPOConfig):
    """Arguments of `AxolotlGRPOTrainer`."""


def common_arguments(cfg: Any, length: RunLength) -> dict[str, Any]:
    """Return the arguments that no method changes.

    Args:
        cfg: a validated config.
        length: what is known of the run's length, which decides warm-up and cadence.

    Raises:
        ValueError: for a precision that this machine doesn't have.
    """
    same = {argument: getattr(cfg, name) for name, argument in SAME.items() if getattr(cfg, name) is not None}
    return {
        **same,
        "per_device_eval_batch_size": cfg.eval_batch_size or cfg.micro_batch_size,
        "max_steps": length.total_steps if length.total_steps is not None else -1,
        "pad_to_multiple_of": cfg.pad_to_multiple_of,
        # Prepared rows carry text beside the ids; the trainer selects the columns itself.
        "remove_unused_columns": False,
        "average_tokens_across_devices": False,
        "disable_tqdm": True,
        # transformers would log a loss that isn't finite as 0.
        "logging_nan_inf_filter": bool(cfg.logging_nan_inf_filter),
        **_precision(cfg),
        **_optimizer(cfg),
        **cadence_arguments(cfg, length),
        **tracker_arguments(cfg),
        **_hub(cfg),
    }


def _precision(cfg: Any) -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    bf16 = cfg.bf16 is True or cfg.bf16 == "full"
    if cfg.bf16 == "auto":
        bf16 = has_gpu and not cfg.fp16 and torch.cuda.is_bf16_supported()
    if cfg.fp16 and not has_gpu:
        raise ValueError("fp16: float16 needs a GPU and this machine has none; use bf16: true, or remove it")
    if bf16 and has_gpu and not torch.cuda.is_bf16_supported():
        raise ValueError("bf16: this GPU has no bfloat16; use fp16: true, or bf16: false")
    pin = cfg.dataloader_pin_memory
    arguments = {
        "use_cpu": not torch.accelerator.is_available(),
        "dataloader_pin_memory": has_gpu if pin is None else pin,
        "bf16": bf16,
        "bf16_full_eval": cfg.bf16 == "full",
        "fp16": cfg.fp16,
    }
    if cfg.tf32 is not None:
        arguments["tf32"] = cfg.tf32 if cfg.tf32 != "auto" else has_gpu and torch.cuda.get_device_capability() >= (8, 0)
    return arguments


def _optimizer(cfg: Any) -> dict[str, Any]:
    own = cfg.lr_scheduler in OWN_SCHEDULES
    extra = cfg.optim_args
    return {
        "optim": cfg.optimizer,
        # transformers parses one string
        "optim_args": ",".join(f"{key}={value}" for key, value in extra.items()) if isinstance(extra, dict) else extra,
        "lr_scheduler_type": "cosine" if own else cfg.lr_scheduler,
        "alternate_lr_scheduler_type": cfg.lr_scheduler if own else None,
        "lr_groups": [group.model_dump() for group in cfg.lr_groups] if cfg.lr_groups else None,
    }


def _hub(cfg: Any) -> dict[str, Any]:
    if cfg.hub_model_id is None:
        return {}
    given = {"hub_strategy": cfg.hub_strategy, "hub_revision": cfg.hub_revision}
    return {
        "push_to_hub": True,
        "hub_model_id": cfg.hub_model_id,
        "hub_private_repo": True if cfg.hub_private_repo is None else cfg.hub_private_repo,
        "hub_always_push": True,
        **{name: value for name, value in given.items() if value is not None},
    }
