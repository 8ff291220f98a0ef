"""Runs that have finished, which several tests look at: each is made once per run of the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.recipes import Recipe, small_recipe
from tests.suite.sharing import make_once

if TYPE_CHECKING:
    from pipeline import TrainResult
    from pipeline.config import RunConfig

__all__ = ["HOSTILE", "LONG_PATH", "REJECTED", "LONG", "adapter_recipe", "full_recipe", "make_adapter_run", "make_full_run"]

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"></div> {{ 7 * 7 }}"
LONG_PATH = "a/very/long/path/without/any/space" * 8
REJECTED = [
    *({"prompt": f"row {row}", "chosen": "same", "rejected": "same"} for row in range(3)),
    {"prompt": "b", "chosen": ["5"], "rejected": "c", "mark": "<b>one</b>"},
    {"prompt": "b", "rejected": "c", "mark": "x"},
    {"prompt": "b", "rejected": "c", "sign": "y"},
]
"""Rows of some kinds of faults."""
LONG = {"num_epochs": 10, "eval_steps": 20, "save_steps": 8}
"""40 steps of 8 pairs each, so that there is time to hit a run in the middle."""


def adapter_recipe(base_model: str, root: Path, **keys: Any) -> RunConfig:
    """40 steps of an adapter on two workers: 32 pairs, 8 a step, and 6 rows that are rejected; two evaluations with answers.

    The four rows of the evaluations have prompts that attack a page.

    Args:
        root: where the data, what is prepared of them, and the run `root/run` go.
    """
    from pipeline.config import parse_config
    from tests.tiny import pairs

    prompts = (HOSTILE, LONG_PATH, "a bell \u0007 and \u202e other signs", "d")
    asked = [{**pair, "prompt": prompt} for pair, prompt in zip(pairs(4), prompts, strict=True)]
    defaults = {
        "base_model": base_model,
        "datasets": [{"path": _write(root / "rows.jsonl", [*pairs(32), *REJECTED])}],
        "test_datasets": [{"path": _write(root / "asked.jsonl", asked)}],
        "dataset_prepared_path": str(root / "prepared"),
        "max_rejected_fraction": 0.5,
        "sequence_len": 400,
        "adapter": "lora",
        "learning_rate": 1e-3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        **LONG,
        "dpo_generate_during_eval": True,
        "bf16": False,
        "output_dir": str(root / "run"),
        "ray": {"num_workers": 2},
    }
    return parse_config({**defaults, **keys})


def full_recipe(base_model: str, root: Path) -> Recipe:
    """`recipe(output_dir, **keys)`: all weights, 32 training pairs and 8 for evaluation, two workers, 12 steps."""
    return small_recipe(
        base_model,
        root,
        warmup_steps=0,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=3,
        eval_steps=4,
        save_steps=4,
        ray={"num_workers": 2},
    )


def make_full_run(factory: pytest.TempPathFactory, base_model: str) -> TrainResult:
    """The `LONG` run of `full_recipe`, which nothing happened to; a Ray must be running."""
    from pipeline import load_run, train

    folder = make_once(factory, "full", lambda root: train(full_recipe(base_model, root)(root / "run", **LONG)))
    return load_run(str(folder / "run"))


def make_adapter_run(factory: pytest.TempPathFactory, base_model: str) -> TrainResult:
    """The run of `adapter_recipe`, which nothing happened to; a Ray must be running."""
    from pipeline import load_run, train

    folder = make_once(factory, "adapter", lambda root: train(adapter_recipe(base_model, root)))
    return load_run(str(folder / "run"))


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    if not path.exists():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
