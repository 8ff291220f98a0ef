"""Recipes of small sweeps."""

from __future__ import annotations

import pytest

from tests.recipes import Recipe, small_recipe


@pytest.fixture(scope="session")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, tune, **keys)`: the tiny model, 32 training pairs and 8 for evaluation, one worker, 16 steps."""
    make = small_recipe(tiny_base, tmp_path_factory.mktemp("data"), sequence_len=128, learning_rate=1e-4, num_epochs=2)
    return lambda output_dir, tune, **keys: make(output_dir, tune=tune, **keys)
