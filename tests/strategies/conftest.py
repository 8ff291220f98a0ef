"""Fixtures of the strategies' tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import prepared_pairs, save_tiny, tiny_model, tiny_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("base"))


def small_config(base: str, folder: Path) -> dict[str, Any]:
    """Keys of a run of a few steps that saves nothing."""
    return {
        "base_model": base,
        "rl": "dpo",
        "learning_rate": 1e-3,
        "micro_batch_size": 2,
        "sequence_len": 128,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "output_dir": str(folder / "run"),
    }


def small_trainer(
    config: dict[str, Any], steps: int | None = 3, model: Any = None, train: Any = None, evaluate: Any = None, **keys: Any
) -> Any:
    """A trainer of the tiny model with prepared training rows."""
    from strategies import HFRLTrainerBuilder

    tokenizer = tiny_tokenizer()
    model = model if model is not None else tiny_model(tokenizer)
    builder = HFRLTrainerBuilder({**config, **keys}, model, tokenizer)
    builder.train_dataset = prepared_pairs(8) if train is None else train
    builder.eval_dataset = evaluate
    return builder.build(steps)


@pytest.fixture
def config(tmp_path: Path, base: str) -> dict[str, Any]:
    return small_config(base, tmp_path)


@pytest.fixture
def build(config: dict[str, Any]) -> Callable[..., Any]:
    """`build(steps, **keys)` -> a trainer of the tiny model with prepared training rows."""
    return partial(small_trainer, config)
