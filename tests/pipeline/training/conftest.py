"""Recipes of small runs."""

from __future__ import annotations

import pytest

from tests.recipes import Recipe
from tests.runs import full_recipe


@pytest.fixture(scope="session")
def recipe(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """`recipe(output_dir, **keys)`: the tiny model, 32 training pairs and 8 for evaluation, two workers, 12 steps."""
    return full_recipe(tiny_base, tmp_path_factory.mktemp("data"))
