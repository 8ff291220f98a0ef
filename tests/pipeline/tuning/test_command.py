"""`prefray tune`: what it refuses before anything starts, in one message and with status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.tuning.folder import recipe_text

runner = CliRunner()
RATE = {"learning_rate": {"loguniform": [1e-6, 1e-4]}}


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        (None, {}, "tune: the recipe has no `tune:` section"),
        (
            {"space": {"learning_rat": {"choice": [1]}}},
            {},
            "tune.space.learning_rat: unknown key; did you mean 'learning_rate'?",
        ),
        ({"space": {"learning_rate": {"uniform": [1, 1]}}}, {}, "the range from 1 to 1 is empty"),
        ({"space": {"learning_rate": {"uniform": [-1, 1]}}}, {}, "tune.space.learning_rate: must be greater than 0, got -1.0"),
        (
            {"space": RATE, "metric": "eval_speed"},
            {},
            "'eval_speed' is not reported by evaluations of rl: dpo; these are: eval_loss",
        ),
        (
            {"space": {"rl_beta": {"choice": [0.1, 0.2]}}, "metric": "eval_loss"},
            {},
            "losses can't be compared where rl_beta differs",
        ),
        (
            {"space": RATE, "slots": 2},
            {},
            "tune.slots: has no effect, since no trials share a base (adapter: not set: it trains",
        ),
        (
            {"space": RATE, "share_base": True},
            {},
            "tune.share_base: true, but adapter: not set: it trains the base itself",
        ),
        ({"space": RATE}, {"hub_model_id": "me/model"}, "hub_model_id: belongs to one run, and a sweep has many"),
        ({"space": RATE}, {"val_set_size": 0}, "tune: trials are compared by evaluations"),
        ({"space": {"base_model": {"choice": ["nowhere/to/be/found"]}}}, {}, "nowhere/to/be/found"),
    ],
)
def test_what_is_refused(
    recipe: Any, tmp_path: Path, section: dict[str, Any] | None, keys: dict[str, Any], message: str
) -> None:
    values = yaml.safe_load(recipe_text(recipe(tmp_path / "sweep", {"space": RATE})))
    values = {name: value for name, value in {**values, "tune": section, **keys}.items() if value is not None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    result = runner.invoke(app, ["tune", str(tmp_path / "recipe.yaml"), "--quiet"])
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_folder_that_holds_something_else(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("x")
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe(tmp_path / "sweep", {"space": RATE})))
    result = runner.invoke(app, ["tune", str(tmp_path / "recipe.yaml"), "--quiet"])
    assert result.exit_code == 2
    assert "is not empty (thesis.txt) and holds no sweep; give another folder" in result.stderr


def test_resume_needs_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["--resume", str(tmp_path / "empty")], "holds no sweep; give the output_dir of one"),
        ([], "give a recipe, or --resume and the output_dir of a sweep"),
        (["recipe.yaml", "--resume", str(tmp_path)], "give either --resume RUN or a recipe"),
    ):
        result = runner.invoke(app, ["tune", *arguments, "--quiet"])
        assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
