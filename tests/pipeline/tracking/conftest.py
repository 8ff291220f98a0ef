"""Trackers that report to this machine, and recipes of small runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from tests.tiny import pairs
from tests.trackers import mlflow_server

Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, **keys)`: the tiny model, 32 training pairs and 8 for evaluation, 8 pairs a step."""
    data = tmp_path_factory.mktemp("data")
    (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(40)))

    def make(output_dir: Path, **keys: Any) -> RunConfig:
        defaults = {
            "base_model": tiny_base,
            "datasets": [{"path": str(data / "pairs.jsonl")}],
            "val_set_size": 8,
            "dataset_prepared_path": str(data / "prepared"),
            "sequence_len": 256,
            "learning_rate": 1e-3,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "output_dir": str(output_dir),
            "ray": {"num_workers": 2},
        }
        return parse_config({**defaults, **keys})

    return make


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as address:
        yield address


@pytest.fixture(scope="session")
def trackers(server: str, trackio_dir: Path) -> dict[str, Any]:
    """Keys of all four."""
    return {
        "use_tensorboard": True,
        "wandb_project": "tests",
        "wandb_mode": "offline",
        "mlflow_tracking_uri": server,
        "mlflow_experiment_name": "tests",
        "trackio_project_name": "tests",
    }
