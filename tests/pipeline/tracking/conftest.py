"""Trackers that report to this machine, and recipes of small runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import Recipe, small_recipe
from tests.trackers import mlflow_server


@pytest.fixture(scope="session")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, **keys)`: the tiny model, 32 training pairs and 8 for evaluation, 8 pairs a step."""
    return small_recipe(tiny_base, tmp_path_factory.mktemp("data"), gradient_accumulation_steps=1, ray={"num_workers": 2})


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
