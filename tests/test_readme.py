"""What the README shows is true: its recipe loads, its Python runs, its commands exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.tuning.space import check_trials, corners
from tests.tiny import pairs, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_two_commands_come_early() -> None:
    top = "\n".join(README.splitlines()[:40])
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target} " in top
        assert f"\n{target}:" in makefile


def test_continuous_integration_calls_what_contributors_call() -> None:
    assert "\nmake checks\n" in (ROOT / ".ci" / "run").read_text()
    assert "\nchecks: lint test\n" in (ROOT / "Makefile").read_text()


def test_the_commands_exist() -> None:
    named = set(re.findall(r"`prefray (\w+)", README)) | set(re.findall(r"bin/prefray (\w+)", README))
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert named == commands | {group.name for group in app.registered_groups}


def test_the_recipe_is_valid() -> None:
    recipe, sweep = (yaml.safe_load(text) for text in blocks("yaml"))
    assert parse_config(recipe).num_workers == 2
    cfg = parse_config({**recipe, **sweep})
    assert cfg.tune is not None
    assert len(check_trials(cfg, corners(cfg.tune))) == 2 * 2 + 2 * 2 * 2 + 2  # ends of ranges, and a point inside


def test_the_folders_are_there() -> None:
    for folder in re.findall(r"^\| `(\w+)/` \|", README.split("## The folders")[1], flags=re.MULTILINE):
        assert any((ROOT / folder).iterdir()), folder


@pytest.mark.usefixtures("ray_session")
def test_the_python_on_ray(tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs(8)))
    recipe = f"base_model: {tiny_base}\ndatasets: [{{path: {tmp_path}/pairs.jsonl}}]\nmax_steps: 1\n"
    Path("recipe.yaml").write_text(recipe)
    space = "{space: {learning_rate: {grid: [0.001]}}, search: grid, baseline: false}"
    Path("sweep.yaml").write_text(f"{recipe}val_set_size: 2\noutput_dir: sweep\ntune: {space}\n")
    names: dict[str, Any] = {}
    exec(blocks("python")[0], names)
    assert names["prepared"].train_rows == 8
    assert names["result"].model_dir == tmp_path / "model-out" / "model"
    assert len(names["result"].history) == 2
    assert names["sweep"].table["status"].tolist() == ["finished"]
    assert names["sweep"].best_config.learning_rate == 0.001 and names["sweep"].best_metrics and len(names["sweep"].front) == 1


def test_the_python_without_ray(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    cfg = {"base_model": "given", "bf16": False, "max_steps": 2, "save_strategy": "no", "output_dir": str(tmp_path)}
    names: dict[str, Any] = {"cfg": cfg, "model": tiny_model(tokenizer), "tokenizer": tokenizer}
    names |= {"train_dataset": pairs(4), "eval_dataset": pairs(2)}
    exec(blocks("python")[1], names)
    assert names["output"].global_step == 2
