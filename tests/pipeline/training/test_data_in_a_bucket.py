"""A run whose rows and scores are in a bucket, as is its folder: that of the same rows at a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline import evaluate, train
from tests.s3 import Bucket


@pytest.mark.usefixtures("ray_session")
def test_a_bucket_is_enough(recipe: Any, s3: Bucket, tmp_path: Path) -> None:
    """Prepared and scored, trained by two workers, reported and evaluated; no process has the keys but this one."""
    keys = {"bf16": False, "num_epochs": 1}
    quiet = train(recipe(tmp_path / "quiet", **keys))
    ray = {"num_workers": 2, "cache_dir": str(tmp_path / "cache")}
    result = train(recipe(s3.uri("runs/one"), dataset_prepared_path=s3.uri("prepared"), ray=ray, **keys))
    weights = Path(str(quiet.model_dir), "model.safetensors").read_bytes()
    assert s3.content("runs/one/model/model.safetensors") == weights
    page = s3.content("runs/one/report.html").decode()
    assert "Length of training rows" in page and "rows to train on" in page
    names = {key.split("/")[-1] for key in s3.objects() if key.startswith("prepared/")}
    assert {"manifest.json", "part-00000.parquet", "ids.json"} <= names and not any(name.endswith(".lease") for name in names)
    assert evaluate(str(result.run_dir), answers=0).metrics == evaluate(str(quiet.run_dir), answers=0).metrics
