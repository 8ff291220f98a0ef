"""Keys of the optimizer and of the learning-rate schedule."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from strategies.keys import Keys, key

__all__ = ["LrGroup", "OptimizerKeys"]


class LrGroup(Keys):
    """Parameters whose name contains one of `modules` train at `lr`."""

    name: str = Field(description="Name of the group, for the log.")
    modules: list[str] = Field(description="Substrings of parameter names.", min_length=1)
    lr: float = Field(description="Learning rate of the group.", gt=0)


class OptimizerKeys(Keys):
    """Optimizer, parameter groups, schedule."""

    # No Literal, nor for `lr_scheduler`: `rules.py` reports an unknown name with the names that exist.
    optimizer: str = key("Optimizer, by the names of transformers (adamw_torch_fused, adafactor, ...).", "adamw_torch_fused")
    optim_args: str | dict[str, Any] | None = key("Further arguments of the optimizer: a mapping or `k=v,k=v`.")
    optim_target_modules: list[str] | str | None = key("Modules that GaLore-like optimizers project.")
    learning_rate: PositiveFloat = key("Peak learning rate.", 5e-6)
    lr_groups: list[LrGroup] | None = key("Separate learning rates for named parts of the model.")
    embedding_lr: PositiveFloat | None = key("Learning rate of the embeddings.")
    embedding_lr_scale: PositiveFloat | None = key("Learning rate of the embeddings as a multiple of learning_rate.")
    loraplus_lr_ratio: PositiveFloat | None = key("LoRA+: learning rate of B as a multiple of A's.")
    loraplus_lr_embedding: PositiveFloat | None = key("LoRA+: learning rate of embedding adapters; 1e-6 when not set.")
    weight_decay: NonNegativeFloat = key("Decoupled weight decay.", 0.0)
    adam_beta1: float | None = key("Adam's beta1.", ge=0, lt=1)
    adam_beta2: float | None = key("Adam's beta2.", ge=0, lt=1)
    adam_epsilon: PositiveFloat | None = key("Adam's epsilon.")
    max_grad_norm: NonNegativeFloat = key("Clip the gradient norm here; 0 turns clipping off.", 1.0)
    lr_scheduler: str = key("Schedule: cosine, linear, constant, ... of transformers, or `rex`, `one_cycle`.", "cosine")
    lr_scheduler_kwargs: dict[str, Any] | None = key("Further arguments of the schedule.")
    cosine_min_lr_ratio: float | None = key("Minimum of cosine and rex as a fraction of learning_rate.", ge=0, le=1)
    cosine_constant_lr_ratio: float | None = key(
        "Fraction of the steps after which cosine stays at its minimum; needs cosine_min_lr_ratio.", gt=0, le=1
    )
    warmup_steps: NonNegativeInt | None = key("Steps of linear warm-up.")
    warmup_ratio: float | None = key(
        "Steps of linear warm-up as a fraction of all steps; 0.03 (at most 100 steps) when neither is set.", ge=0, le=1
    )
