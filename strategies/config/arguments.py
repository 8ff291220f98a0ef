"""Trainer arguments from config keys, common to all methods."""

from __future__ import annotations

from typing import Any

import torch

from strategies.config.names import CUSTOM_SCHEDULES
from strategies.config.schedule import RunLength, schedule_arguments
from strategies.config.trackers import tracker_arguments

__all__ = ["SAME", "common_arguments"]

# Config key -> argument with the same meaning; an unset key keeps the argument's default.
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
    # transformers renamed these two; TRL enables the first by default.
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "torch_compile": "torch_compile",
    "torch_compile_backend": "torch_compile_backend",
    "torch_compile_mode": "torch_compile_mode",
    "accelerator_config": "accelerator_config",
}


def common_arguments(cfg: Any, length: RunLength) -> dict[str, Any]:
    """Return the arguments common to all methods.

    Args:
        cfg: a validated config.
        length: length of the run as far as known, for warm-up and the evaluation and save schedule.

    Raises:
        ValueError: for a precision that this machine doesn't support.
    """
    same = {argument: getattr(cfg, name) for name, argument in SAME.items() if getattr(cfg, name) is not None}
    return {
        **same,
        "per_device_eval_batch_size": cfg.eval_batch_size or cfg.micro_batch_size,
        "max_steps": length.total_steps if length.total_steps is not None else -1,
        # Also when it isn't set: TRL's default, `auto`, pads to 128 on Neuron.
        "pad_to_multiple_of": cfg.pad_to_multiple_of,
        # Prepared rows have text columns too; the trainer selects the columns itself.
        "remove_unused_columns": False,
        # For losses that transformers averages over tokens; those here are averaged over rows, or by TRL.
        "average_tokens_across_devices": False,
        "disable_tqdm": True,
        # transformers would log the mean of earlier losses in place of a non-finite one, 0 where there are none.
        "logging_nan_inf_filter": bool(cfg.logging_nan_inf_filter),
        **_precision(cfg),
        **_optimizer(cfg),
        **schedule_arguments(cfg, length),
        **tracker_arguments(cfg),
        **_hub(cfg),
    }


def _precision(cfg: Any) -> dict[str, Any]:
    # bf16 is never left to TRL, whose configs turn it on where it is None.
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
        # TensorFloat-32 came with compute capability 8.0 (Ampere).
        arguments["tf32"] = cfg.tf32 if cfg.tf32 != "auto" else has_gpu and torch.cuda.get_device_capability() >= (8, 0)
    return arguments


def _optimizer(cfg: Any) -> dict[str, Any]:
    is_custom = cfg.lr_scheduler in CUSTOM_SCHEDULES
    extra = cfg.optim_args
    return {
        "optim": cfg.optimizer,
        # transformers parses one string
        "optim_args": ",".join(f"{key}={value}" for key, value in extra.items()) if isinstance(extra, dict) else extra,
        # A name that transformers knows: it checks this one, and `SchedulerMixin` reads the other one first.
        "lr_scheduler_type": "cosine" if is_custom else cfg.lr_scheduler,
        "alternate_lr_scheduler_type": cfg.lr_scheduler if is_custom else None,
        "lr_groups": [group.model_dump() for group in cfg.lr_groups] if cfg.lr_groups else None,
    }


def _hub(cfg: Any) -> dict[str, Any]:
    if cfg.hub_model_id is None:
        return {}
    optional = {"hub_strategy": cfg.hub_strategy, "hub_revision": cfg.hub_revision}
    return {
        "push_to_hub": True,
        "hub_model_id": cfg.hub_model_id,
        # transformers' default is public; a model of private data must not be published by leaving a key out.
        "hub_private_repo": True if cfg.hub_private_repo is None else cfg.hub_private_repo,
        # Otherwise a checkpoint is not pushed while the push of the one before is in progress.
        "hub_always_push": True,
        **{name: value for name, value in optional.items() if value is not None},
    }
