"""Training without Ray: in one process, or in each of those that `torchrun` starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from strategies.builder import HFRLTrainerBuilder
from strategies.cadence import total_steps
from strategies.config import as_config
from strategies.models import load_model
from strategies.saving import save_final
from strategies.sharding import divided_loading
from strategies.tokenizer import load_tokenizer

__all__ = ["TrainDatasetMeta", "total_steps", "train"]


@dataclass
class TrainDatasetMeta:
    """The rows of a run: raw pairs or prepared ones."""

    train_dataset: Any
    eval_dataset: Any = None
    total_num_steps: int | None = None
    """Optimizer steps; None runs `num_epochs` epochs."""


def train(cfg: Any, dataset_meta: TrainDatasetMeta, sharding: Mapping[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """Load, build, train and save to `{output_dir}/model`; returns (model, tokenizer, trainer).

    Args:
        cfg: a validated config, or a dict of the same keys.
        sharding: further arguments of the trainer's, as `cluster.sharding.sharding_arguments` gives them.

    Raises:
        ValueError: naming the config key that is wrong, or rows that can't be trained on.
    """
    cfg = as_config(cfg)
    if "://" in cfg.output_dir:
        raise ValueError(f"output_dir: must be a path without Ray, got {cfg.output_dir!r}")
    set_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg)
    with divided_loading(cfg, sharding or {}):
        model = load_model(cfg, tokenizer)
    builder = HFRLTrainerBuilder(cfg, model, tokenizer)
    builder.extra_arguments = dict(sharding or {})
    builder.train_dataset = dataset_meta.train_dataset
    builder.eval_dataset = dataset_meta.eval_dataset
    trainer = builder.build(dataset_meta.total_num_steps)
    trainer.train()
    save_final(trainer, tokenizer, Path(cfg.output_dir) / "model")
    return trainer.accelerator.unwrap_model(trainer.model), tokenizer, trainer
