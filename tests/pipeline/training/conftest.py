"""Recipes of small runs."""

from __future__ import annotations

import pytest

from tests.recipes import Recipe, small_recipe


@pytest.fixture(scope="session")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, **keys)`: the tiny model, 32 training pairs and 8 for evaluation, two workers, 12 steps."""
    return small_recipe(
        tiny_base,
        tmp_path_factory.mktemp("data"),
        warmup_steps=0,
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        num_epochs=3,
        eval_steps=4,
        save_steps=4,
        ray={"num_workers": 2},
    )
