"""A sweep whose folder is in an S3 bucket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import tune, write_report
from pipeline.tuning.folder import load_sweep
from tests.s3 import Bucket


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_on_s3(recipe: Any, s3: Bucket, tmp_path: Path) -> None:
    """Trials know neither address nor keys but from their driver."""
    section = {"space": {"learning_rate": {"grid": [1e-3]}}, "search": "grid", "baseline": False}
    where = s3.uri("sweeps/one")
    # Its accuracy is 1 from the start, so it stops early by itself, which is an end like any other.
    result = tune(recipe(where, section, num_epochs=5, eval_steps=4, early_stopping_patience=1))
    assert [record.status for record in result.records] == ["finished"]
    assert result.records[0].step == result.records[0].total_steps < 40
    names = {key.removeprefix("sweeps/one/") for key in s3.objects()}
    assert {"best.yaml", "report.html", "trials.csv", "trials.parquet", "trials.json", "config.yaml", "sweep.json"} <= names
    assert {"trials/000/metrics.jsonl", "trials/000/model/model.safetensors"} <= names
    assert any(name.startswith("tune/") for name in names)
    assert (result.run_dir, result.best_config.output_dir) == (where, f"{where}/best")
    assert "trials/000/report.html" not in names
    assert write_report(f"{where}/trials/000") == f"{where}/trials/000/report.html"
    assert write_report(where, tmp_path / "page.html") == tmp_path / "page.html"
    assert "Sweep of s3://" in (tmp_path / "page.html").read_text()
    leaks = [key for key in s3.objects() if s3.variables["AWS_SECRET_ACCESS_KEY"].encode() in s3.content(key)]
    assert not leaks and any(key.endswith("tuner.pkl") for key in s3.objects())
    again = tune(load_sweep(where), resume=True)
    assert again.best_metrics == result.best_metrics
