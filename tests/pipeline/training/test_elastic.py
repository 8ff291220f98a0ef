"""A run whose workers leave and come goes on with the same global batches and the same schedule."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import dump_config
from pipeline.runs.metrics import MetricsFile

ROOT = Path(__file__).parents[3]
KEYS: dict[str, Any] = {
    "max_steps": 60,
    "eval_steps": 60,
    "save_steps": 20,
    "lr_scheduler": "linear",
    "learning_rate": 1e-4,
}


@pytest.mark.cluster
@pytest.mark.timeout(700)
def test_a_node_is_lost_and_another_comes(recipe: Any, tmp_path: Path) -> None:
    """The losses are those of two workers that nothing happened to."""
    elastic = {"plugins": ["tests.pipeline.training.elastic_gates"]}
    workers = {"num_workers": {"min": 1, "max": 2}, "max_failures": 5}
    for name, keys in {"quiet": {}, "elastic": {**elastic, "ray": workers}}.items():
        (tmp_path / f"{name}.yaml").write_text(dump_config(recipe(tmp_path / name, **KEYS, **keys)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    module = "tests.pipeline.training.elastic_scenario"
    command = [sys.executable, "-m", module, str(tmp_path / "quiet.yaml"), str(tmp_path / "elastic.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    expected, records = (_losses(tmp_path / name) for name in ("quiet", "elastic"))
    assert [record["step"] for record in records] == [record["step"] for record in expected] == list(range(1, 61))
    losses = [record["loss"] for record in expected]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    assert [record["learning_rate"] for record in records] == [record["learning_rate"] for record in expected]
    notes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
    first, second = [note for note in notes if note.startswith("continuing")]
    assert re.fullmatch(
        r"continuing from the checkpoint of step 20: \d+ steps are repeated", first
    )  # a lost worker lives on a bit
    assert re.fullmatch(r"continuing from the checkpoint of step 40: \d+ steps are repeated", second)


def _losses(folder: Path) -> list[dict[str, Any]]:
    """What was logged of the steps."""
    return [record for record in MetricsFile(folder / "metrics.jsonl").read() if "loss" in record]
