"""A run whose base model and adapter are in a bucket: that of the same models in folders."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import train
from pipeline.errors import RunCancelled, UserError
from tests.pipeline.test_remote_models import upload
from tests.pipeline.training.test_train import Recorder
from tests.s3 import Bucket
from tests.tiny import adapter_folder, save_tiny


class _StopsAtACheckpoint(Recorder):
    """Cancels its run when the first checkpoint is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.cancel = threading.Event()

    def saved(self, name: str) -> None:
        self.cancel.set()


@pytest.mark.usefixtures("ray_session")
def test_a_run_from_a_bucket_is_that_of_folders(recipe: Any, tiny_base: str, s3: Bucket, tmp_path: Path) -> None:
    """Scored, trained by two workers, and resumed with another cache, which is empty; not with another base in the bucket."""
    adapter, run = adapter_folder(tmp_path / "adapter"), tmp_path / "run"
    keys = {"adapter": "lora", "num_epochs": 2, "save_steps": 2, "eval_steps": 4, "bf16": False}
    quiet = train(recipe(tmp_path / "quiet", lora_model_dir=adapter, **keys))
    there = {"base_model": upload(tiny_base, s3, "base"), "lora_model_dir": upload(adapter, s3, "adapter")}
    prepared = str(tmp_path / "prepared")

    def of_node(name: str) -> Any:
        ray = {"num_workers": 2, "cache_dir": str(tmp_path / name)}
        return recipe(run, ray=ray, dataset_prepared_path=prepared, **keys, **there)

    display = _StopsAtACheckpoint()
    with pytest.raises(RunCancelled):
        train(of_node("one"), display=display, cancel=display.cancel)
    shutil.rmtree(tmp_path / "one")
    upload(save_tiny(tmp_path / "other", seed=9), s3, "base")
    with pytest.raises(UserError, match="--resume: the (reference|base model) has changed"):
        train(of_node("two"), resume=True)
    upload(tiny_base, s3, "base")
    display = Recorder()
    result = train(of_node("two"), resume=True, display=display)
    assert any(note.startswith("continuing from the checkpoint of step") for note in display.notes)
    assert_same_run(Path(str(quiet.run_dir)), Path(str(result.run_dir)))
    assert json.loads((run / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == there["base_model"]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: saved[key] for key in there} == there
    copies = str(tmp_path / "two" / "model-").encode()
    assert [file for file in run.rglob("*") if file.is_file() and copies in file.read_bytes()] == []


def assert_same_run(one: Path, other: Path) -> None:
    """The same adapter, byte for byte, of the same base and beside the same scores."""
    weights = [(run / "model" / "adapter_model.safetensors").read_bytes() for run in (one, other)]
    assert weights[0] == weights[1]
    inputs = [json.loads((run / "run.json").read_text()) for run in (one, other)]
    assert all(inputs[0][name] == inputs[1][name] for name in ("prepared", "scores", "base"))
