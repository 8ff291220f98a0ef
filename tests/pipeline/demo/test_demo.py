"""The demonstration with the real model, cut short: it says that it has not reached its goal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.demo.report import Comparison
from pipeline.evaluation.generate import Answers

ROOT = Path(__file__).parents[3]


def answers(**texts: tuple[str, str]) -> Answers:
    """By prompt: what the model said before training, and after it."""
    rows = [{"prompt": f"{name}?", "reference": before, "policy": after} for name, (before, after) in texts.items()]
    return Answers("run", "base", tuple(rows))


@pytest.fixture
def console() -> Console:
    return Console(width=120, record=True, file=open(os.devnull, "w"))


def test_an_improvement_is_called_one(console: Console) -> None:
    given = answers(a=("It is.", "In short, it is."), b=("It is.", "It is."))
    comparison = Comparison(given, shown=1, seconds=3)
    console.print(comparison)
    assert comparison.improved
    text = console.export_text()
    assert "opens with 'In short,': 0% before, 50% after, of 2 held-out prompts" in text
    assert "✓ In short, it is." in text
    assert "b?" not in text


def test_no_improvement_is_called_that(console: Console) -> None:
    given = answers(a=("In short, it is.", "In short, it is."))
    comparison = Comparison(given, shown=1, seconds=3)
    console.print(comparison)
    assert not comparison.improved
    assert "It did NOT improve" in console.export_text()


@pytest.mark.realmodel
@pytest.mark.driver
def test_one_step_is_not_enough(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.demo", "--prompts", "2", "--set", "max_steps=1", "--set", "ray.num_workers=1"]
    command += [
        "--set",
        "eval_strategy='no'",
        "--set",
        "eval_steps=null",
        "--set",
        "save_steps=1",
        "--set",
        "micro_batch_size=2",
        "--set",
        "reference=live",  # one step needs two pairs of the several hundred that would be scored
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 1, process.stderr
    assert "opens with 'In short,': 0% before, 0% after, of 2 held-out prompts" in process.stdout
    assert "It did NOT improve" in process.stdout
    assert (tmp_path / "prefray-demo" / "run-1" / "model" / "adapter_model.safetensors").is_file()
