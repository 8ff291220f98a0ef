"""Recipes of small sweeps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from tests.tiny import pairs

Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, tune, **keys)`: the tiny model, 32 training pairs and 8 for evaluation, one worker, 16 steps."""
    data = tmp_path_factory.mktemp("data")
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(40)))

    def make(output_dir: Path, tune: dict[str, Any], **keys: Any) -> RunConfig:
        defaults = {
            "base_model": tiny_base,
            "datasets": [{"path": str(data / "pairs.jsonl")}],
            "val_set_size": 8,
            "dataset_prepared_path": str(data / "prepared"),
            "sequence_len": 128,
            "learning_rate": 1e-4,
            "micro_batch_size": 4,
            "num_epochs": 2,
            "logging_steps": 1,
            "output_dir": str(output_dir),
            "tune": tune,
        }
        return parse_config({**defaults, **keys})

    return make
