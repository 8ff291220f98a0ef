"""A run whose workers leave and come goes on with the same global batches and the same schedule."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.config import dump_config
from pipeline.training.metrics import MetricsFile

ROOT = Path(__file__).parents[3]
KEYS: dict[str, Any] = {
    "max_steps": 800,
    "eval_steps": 800,
    "save_steps": 20,
    "lr_scheduler": "linear",
    "learning_rate": 1e-4,
}


@pytest.mark.timeout(900)
def test_a_node_is_lost_and_another_comes(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """The losses are those of two workers that nothing happened to."""
    quiet = train(recipe(tmp_path / "quiet", **KEYS))
    elastic = {"num_workers": {"min": 1, "max": 2}, "max_failures": 5}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_config(recipe(tmp_path / "elastic", **KEYS, ray=elastic)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    command = [sys.executable, "-m", "tests.pipeline.training.elastic_scenario", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print(done.stdout)
    records = [record for record in MetricsFile(tmp_path / "elastic" / "metrics.jsonl").read() if "loss" in record]
    expected = quiet.history.dropna(subset=["loss"])
    assert [record["step"] for record in records] == expected["step"].tolist()
    assert [record["loss"] for record in records] == pytest.approx(expected["loss"].tolist(), rel=1e-3, abs=1e-5)
    assert [record["learning_rate"] for record in records] == expected["learning_rate"].tolist()
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert sum(note.startswith("continuing from the checkpoint of step") for note in notes) == 2
