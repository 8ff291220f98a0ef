"""Small runs that have finished: one with an adapter, one of all weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import load_run, train
from pipeline.config import RunConfig, parse_config
from pipeline.runs.result import TrainResult
from tests.suite.sharing import make_once
from tests.tiny import pairs

Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def evaluation_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of pairs, one named `a.jsonl` of 30, one `b.jsonl` of 10."""

    def make(root: Path) -> None:
        rows = pairs(40)
        for name, own in (("a", rows[:30]), ("b", rows[30:])):
            (root / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in own))

    return make_once(tmp_path_factory, "evaluated", make)


@pytest.fixture(scope="session")
def recipe(tiny_base: str, evaluation_root: Path) -> Recipe:
    """`recipe(output_dir, **keys)`: 4 steps on 24 pairs, 16 for evaluation at the end."""

    def make(output_dir: str, **keys: Any) -> RunConfig:
        defaults = {
            "base_model": tiny_base,
            "datasets": [{"path": str(evaluation_root / f"{file}.jsonl")} for file in ("a", "b")],
            "val_set_size": 16,
            "dataset_prepared_path": str(evaluation_root / "prepared"),
            "sequence_len": 256,
            "learning_rate": 5e-3,
            "warmup_steps": 0,
            "micro_batch_size": 4,
            "max_steps": 4,
            "eval_steps": 4,
            "save_strategy": "no",
            "bf16": False,
            "output_dir": output_dir,
        }
        return parse_config({**defaults, **keys})

    return make


@pytest.fixture(scope="session")
def adapter_run(ray_session: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return trained(tmp_path_factory, "adapter", lambda folder: recipe(folder, adapter="lora", rl_beta=0.2))


@pytest.fixture(scope="session")
def full_run(ray_session: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return trained(tmp_path_factory, "full", lambda folder: recipe(folder, rl="simpo"))


def trained(factory: pytest.TempPathFactory, name: str, recipe: Callable[[str], RunConfig]) -> TrainResult:
    folder = make_once(factory, f"evaluated-{name}", lambda folder: train(recipe(str(folder / "run"))))
    return load_run(str(folder / "run"))
