"""An outside package on Ray: installed, with entry points; and a module of the current directory, in a sweep."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest
import yaml

from tests.tiny import pairs

ROOT = Path(__file__).parents[2]
PACKAGE = Path(__file__).parent / "prefray_example"
RECIPE = {"sequence_len": 128, "learning_rate": 1e-3, "warmup_steps": 0, "micro_batch_size": 2, "logging_steps": 1}
MODULE = '''
from pathlib import Path

from torch.nn.functional import logsigmoid
from transformers import TrainerCallback

from strategies import register_callback, register_loss


@register_loss("mine", reads=["beta"])
def mine(policy, reference, options):
    """DPO's."""
    return -logsigmoid(options.beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)))


@register_callback
class Seen(TrainerCallback):
    def on_train_begin(self, args, state, control, **_):
        (Path(__file__).parent / f"seen-{'-'.join(args.loss_type)}").touch()
'''
pytestmark = [pytest.mark.install, pytest.mark.driver, pytest.mark.timeout(1000)]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the outside package is installed into, by pip."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(PACKAGE, folder / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder / "target")]
    subprocess.run([*pip, *options, str(source)], check=True, timeout=300)
    return folder / "target"


@pytest.fixture
def run(tmp_path: Path, tiny_base: str) -> Run:
    """`run(command, rows, recipe, *path, **environment)`: a command in a folder of its own."""

    def command(name: str, rows: list[Any], recipe: dict[str, Any], *path: Path, **environment: str) -> Any:
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        (tmp_path / "recipe.yaml").write_text(
            yaml.safe_dump({"base_model": tiny_base, **RECIPE, "output_dir": "out", **recipe})
        )
        places = os.pathsep.join(map(str, [*path, ROOT]))
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", name, "recipe.yaml", "--quiet"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": places, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=800,
        )
        assert done.returncode == 0, done.stderr
        return done

    return command


def test_an_installed_package(run: Run, installed: Path, tmp_path: Path) -> None:
    """A dataset type gives the rows, a strategy with a key of its own trains by its loss, a callback is in both workers."""
    rows: list[Any] = [
        {"ask": f"What is {n} plus 1?", "answers": [{"text": "no", "score": 0}, {"text": str(n + 1), "score": 2}]}
        for n in range(8)
    ]
    rows.append({"ask": "Which?", "answers": [{"text": "a", "score": 1}, {"text": "b", "score": 1}]})
    recipe = {
        "rl": "offset_dpo",
        "dpo_offset": 0.75,
        "datasets": [{"path": "rows.jsonl", "type": "ranked", "field_prompt": "ask"}],
        "max_rejected_fraction": 0.2,
        "max_steps": 2,
        "ray": {"num_workers": 2},
    }
    run("train", rows, recipe, installed, STEP_LOG=str(tmp_path / "steps"))
    (store,) = (tmp_path / "last_run_prepared").glob("*/manifest.json")
    prepared = pq.read_table(store.parent / "train").to_pylist()
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in prepared]
    assert texts == [(f"What is {n} plus 1?\n", str(n + 1), "no") for n in range(8)]
    (rejected,) = pq.read_table(store.parent / "rejected").to_pylist()
    assert (rejected["row_number"], rejected["reason"]) == (9, "all answers have the same score")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[0] == pytest.approx(math.log1p(math.exp(0.75)), abs=1e-5)  # policy and reference are the same
    assert losses[1] < losses[0]
    steps = sorted((tmp_path / "steps").read_text().splitlines())
    assert steps == [f"offset_dpo {rank} {step}" for rank in (0, 1) for step in (1, 2)]
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["dpo_offset"] == 0.75


def test_a_module_of_the_current_directory_in_a_sweep(run: Run, tmp_path: Path) -> None:
    """Trials and their workers know the loss; the same formula as the built-in one gives the same numbers."""
    (tmp_path / "my_plugins.py").write_text(MODULE)
    recipe = {
        "plugins": ["my_plugins"],
        "datasets": [{"path": "rows.jsonl"}],
        "val_set_size": 2,
        "max_steps": 2,
        "tune": {"space": {"dpo_loss_type": {"grid": ["sigmoid", "mine"]}}, "search": "grid", "baseline": False},
    }
    run("tune", pairs(10), recipe)
    trials = pandas.read_csv(tmp_path / "out" / "trials.csv")
    assert trials["status"].tolist() == ["finished", "finished"]
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        first, second = trials[name].tolist()
        assert first == pytest.approx(second, rel=1e-5) and first != 0
    assert {path.name for path in tmp_path.glob("seen-*")} == {"seen-sigmoid", "seen-mine"}
    assert yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())["plugins"] == ["my_plugins"]
