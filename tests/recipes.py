"""Recipes of small runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["Recipe", "small_recipe"]

Recipe = Callable[..., "RunConfig"]


def small_recipe(base_model: str, data: Path, **defaults: Any) -> Recipe:
    """`recipe(output_dir, **keys)`: 32 training pairs and 8 for evaluation; every step is logged.

    Args:
        base_model: folder of a tiny model.
        data: where the pairs go, and what is prepared of them.
        defaults: keys of all these recipes.
    """
    from pipeline.config import parse_config
    from tests.tiny import pairs

    if not (data / "pairs.jsonl").exists():
        (data / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(40)))
    common = {
        "base_model": base_model,
        "datasets": [{"path": str(data / "pairs.jsonl")}],
        "val_set_size": 8,
        "dataset_prepared_path": str(data / "prepared"),
        "sequence_len": 256,
        "learning_rate": 1e-3,
        "micro_batch_size": 4,
        "logging_steps": 1,
    }

    def make(output_dir: Path, **keys: Any) -> RunConfig:
        return parse_config({**common, **defaults, "output_dir": str(output_dir), **keys})

    return make
