"""The arguments of the trainers: TRL's, and those of our mixins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl import DPOConfig, GRPOConfig, KTOConfig

from strategies.losses.types import LossOptions

__all__ = ["AxolotlDPOConfig", "AxolotlGRPOConfig", "AxolotlKTOConfig", "AxolotlTrainingMixins"]


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
    """Action at a step whose loss or gradient norm is not finite: stop or skip."""


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
    """`LossOptions.own`: options of losses without an argument, by keys (`key(option=...)`) or an external strategy."""
    sample_packing: bool = True
    """Pack pairs into rows, each prompt once; False: padded batches of `per_device_train_batch_size` pairs."""
    tokens_per_forward: int | None = None
    """Maximum tokens of one packed row; None: twice `max_length`."""
    global_batch_size: int | None = None
    """Pairs of an optimizer step, over all workers; None: per-device size x accumulation x workers."""


@dataclass
class AxolotlKTOConfig(AxolotlTrainingMixins, KTOConfig):
    """Arguments of `AxolotlKTOTrainer`."""


@dataclass
class AxolotlGRPOConfig(AxolotlTrainingMixins, GRPOConfig):
    """Arguments of `AxolotlGRPOTrainer`."""
