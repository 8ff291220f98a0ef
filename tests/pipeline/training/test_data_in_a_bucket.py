"""A run whose rows and scores are in a bucket, as is its folder: that of the same rows at a path."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import evaluate, train
from pipeline.errors import UserError
from pipeline.io import filesystems
from pipeline.training.launch import TrainingLauncher
from tests.s3 import Bucket, S3Server

AWAY_S = 12.0
"""Seconds until workers have surely asked for their rows."""


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


class Impatience:
    """Makes processes that it is sent to give up after seconds, not minutes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("from pipeline.io import retry\nretry.RETRY_TIMEOUT_S = 2.0",)


@pytest.mark.usefixtures("ray_session")
def test_a_bucket_that_is_away_when_workers_read_their_rows(
    recipe: Any, own_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for it. Where it doesn't come back it is one message, and the next run uses what was prepared and scored."""
    monkeypatch.setattr(filesystems, "S3_ATTEMPTS", 2)
    cache = {"num_workers": 2, "cache_dir": str(tmp_path / "cache")}
    keys = {"bf16": False, "max_steps": 2, "dataset_prepared_path": own_s3.uri("prepared"), "ray": cache}
    quiet = train(recipe(tmp_path / "quiet", **{**keys, "ray": {**cache, "cache_dir": str(tmp_path / "other")}}))
    objects, train_workers = own_s3.objects(), TrainingLauncher.run

    def without_bucket(launcher: TrainingLauncher) -> Any:
        own_s3.stop()
        launcher.plan.prepared.folder.impatience = Impatience()  # type: ignore[attr-defined]
        return train_workers(launcher)

    monkeypatch.setattr(TrainingLauncher, "run", without_bucket)
    with pytest.raises(UserError, match=r"^s3://.*part-00000.parquet can't be read: .*AWS Error NETWORK_CONNECTION"):
        train(recipe(tmp_path / "run", **keys))

    def with_bucket_soon(launcher: TrainingLauncher) -> Any:
        own_s3.stop()
        threading.Timer(AWAY_S, own_s3.start).start()
        return train_workers(launcher)

    own_s3.start()
    assert own_s3.objects() == objects
    monkeypatch.setattr(TrainingLauncher, "run", with_bucket_soon)
    result = train(recipe(tmp_path / "later", **keys))
    assert own_s3.objects() == objects
    first, second = (Path(str(run.model_dir), "model.safetensors").read_bytes() for run in (quiet, result))
    assert first == second
