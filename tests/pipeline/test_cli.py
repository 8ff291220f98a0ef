"""The command: what it prints, and how it ends."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import RunConfig
from tests.tiny import pairs

ROOT = Path(__file__).parents[2]
runner = CliRunner()


@pytest.fixture(autouse=True)
def _handlers_of_an_earlier_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's log handlers keep the stream of the first command that the runner ran, which is closed by now."""
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: str) -> Path:
    rows = [*pairs(30), {"prompt": "a", "chosen": "same", "rejected": "same"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"base_model: {tiny_base}\nrl: dpo\ndatasets:\n  - path: {tmp_path}/pairs.jsonl\nval_set_size: 6\n"
        f"max_rejected_fraction: 0.05\ndataset_prepared_path: {tmp_path}/prepared\noutput_dir: {tmp_path}/run\n"
        "max_steps: 2\nlogging_steps: 1\nsave_strategy: 'no'\neval_strategy: 'no'\n"
    )
    return path


def test_a_wrong_recipe_ends_in_its_message_and_status_2(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base_model: m\nrl_bta: 0.1\n")
    command = [sys.executable, "-m", "pipeline", "train", str(path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        f"prefray: {path}: 2 problems",
        "  datasets: is required",
        "  rl_bta: unknown key; did you mean 'rl_beta'?",
    ]


def test_a_missing_recipe() -> None:
    result = runner.invoke(app, ["prepare", "none.yaml"])
    assert result.exit_code == 2
    assert "prefray: none.yaml: can't be read: no such file" in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = runner.invoke(app, ["prepare", "none.yaml", "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    assert runner.invoke(app, ["tran"]).exit_code == 2


def test_the_schema_lists_every_key() -> None:
    schema = json.loads(runner.invoke(app, ["schema"]).stdout)
    assert set(schema["properties"]) == set(RunConfig.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.main_job
@pytest.mark.usefixtures("ray_session")
def test_too_many_bad_rows_fail(recipe: Path) -> None:
    result = runner.invoke(app, ["prepare", str(recipe), "--set", "max_rejected_fraction=0.01"])
    assert result.exit_code == 2
    assert "max_rejected_fraction" in result.stderr
    assert "chosen" in result.stderr
    assert "Traceback" not in result.stderr
