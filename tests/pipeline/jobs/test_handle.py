"""Jobs from Python; `tests/notebooks` submits and follows one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import Job, submit
from pipeline.errors import UserError

NOBODY = "http://127.0.0.1:9"


def test_nobody_answers() -> None:
    with pytest.raises(ValueError, match="127.0.0.1:9"):
        Job("dpo-1", NOBODY)


def test_a_recipe_is_looked_at_before_a_cluster_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recipe.yaml: can't be read: no such file"):
        submit("train", "recipe.yaml", address=NOBODY, working_dir=tmp_path)
