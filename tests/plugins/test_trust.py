"""Whose code runs when somebody's run is looked at, or used."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.runs.folder import RunFolder
from tests.plugins.conftest import Write

runner = CliRunner()
TRAP = "from pathlib import Path\n(Path(__file__).parent / 'was_here').touch()\n"
COMMANDS = {
    "evaluate": ["--answers", "0", "--quiet"],
    "generate": ["hello", "--max-new-tokens", "2", "--quiet"],
    "merge": ["--no-verify", "--quiet"],
}

pytestmark = pytest.mark.main_job


@pytest.fixture
def trapped(finished_adapter: Any, tmp_path: Path, write: Write) -> Path:
    """A copy of a run, in the current directory, whose config names a plugin that lies there too."""
    write("my_trap", TRAP)
    shutil.copytree(finished_adapter.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "plugins": ["my_trap"]}))
    return tmp_path


def test_looking_at_a_run_imports_nothing(trapped: Path) -> None:
    (trapped / "run" / "report.html").unlink()
    result = runner.invoke(app, ["report", "run"])
    assert result.exit_code == 0, result.stderr
    assert (trapped / "run" / "report.html").exists()
    assert not (trapped / "was_here").exists() and "my_trap" not in sys.modules


def test_keys_that_only_a_plugin_knows_need_trust(trapped: Path) -> None:
    config = trapped / "run" / "config.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "rl": "somebodys"}))
    result = runner.invoke(app, ["report", "run"])
    assert result.exit_code == 2
    assert "they are loaded with --trust" in result.stderr and "somebodys" in result.stderr, result.stderr
    assert not (trapped / "was_here").exists()
    assert runner.invoke(app, ["report", "run", "--trust"]).exit_code == 2
    assert (trapped / "was_here").exists()


@pytest.mark.parametrize("command", list(COMMANDS))
def test_using_a_run_asks_for_trust(trapped: Path, command: str) -> None:
    result = runner.invoke(app, [command, "run", *COMMANDS[command]])
    assert result.exit_code == 2
    assert "run: its config would run code here (plugins: my_trap); give --trust if you know who wrote it" in result.stderr
    assert not (trapped / "was_here").exists()
    result = runner.invoke(app, [command, "run", *COMMANDS[command], "--trust"])
    assert (trapped / "was_here").exists()
    assert result.exit_code == 2 and "my_trap registers nothing" in result.stderr  # it was loaded


def test_resuming_does_not_load_what_the_folder_names(trapped: Path) -> None:
    recipe = yaml.safe_load((trapped / "run" / "config.yaml").read_text())
    cfg = parse_config({key: value for key, value in recipe.items() if key != "plugins"})
    assert RunFolder(trapped / "run").changes(cfg) == ["plugins: was ['my_trap'], is None"]
    assert not (trapped / "was_here").exists()
