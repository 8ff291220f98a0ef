"""Training without Ray: in one process, or in each process of `torchrun`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from strategies.builder import HFRLTrainerBuilder
from strategies.config import as_config
from strategies.config.schedule import total_steps
from strategies.dataset_rows import have_pictures
from strategies.models.loading import load_model
from strategies.models.processor import load_processor
from strategies.models.saving import save_final
from strategies.models.sharding import zero3_init_context
from strategies.models.tokenizer import load_tokenizer

__all__ = ["TrainDatasetMeta", "total_steps", "train"]


@dataclass
class TrainDatasetMeta:
    """The rows of a run: raw ones, with or without pictures, or prepared ones."""

    train_dataset: Any
    eval_dataset: Any = None
    total_num_steps: int | None = None
    """Optimizer steps; None runs `num_epochs` epochs."""


def train(cfg: Any, dataset_meta: TrainDatasetMeta, sharding: Mapping[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """Load, build, train and save to `{output_dir}/model`; return (model, tokenizer, trainer).

    Args:
        cfg: a validated config, or a dict of the same keys.
        sharding: further arguments of the trainer, as returned by `cluster.sharding.sharding_arguments`.

    Raises:
        ValueError: naming the invalid config key, or rows that can't be trained on.
    """
    cfg = as_config(cfg)
    if "://" in cfg.output_dir:
        raise ValueError(f"output_dir: must be a path without Ray, got {cfg.output_dir!r}")
    # TRL draws a new adapter's weights before transformers' constructor sets the seed.
    set_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg)
    with zero3_init_context(cfg, sharding or {}):
        model = load_model(cfg, tokenizer)
    datasets = (dataset_meta.train_dataset, dataset_meta.eval_dataset)
    # Only for pictures: without a processor, the builder freezes the tower.
    processor = load_processor(cfg, tokenizer) if any(map(have_pictures, datasets)) else None
    builder = HFRLTrainerBuilder(cfg, model, tokenizer, processor)
    builder.extra_arguments = dict(sharding or {})
    builder.train_dataset = dataset_meta.train_dataset
    builder.eval_dataset = dataset_meta.eval_dataset
    trainer = builder.build(dataset_meta.total_num_steps)
    trainer.train()
    save_final(trainer, tokenizer if processor is None else processor, Path(cfg.output_dir) / "model")
    # Not `model`: a new adapter is on the trainer's alone.
    return trainer.accelerator.unwrap_model(trainer.model), tokenizer, trainer
