"""A run on Ray whose folder is in an S3 bucket; nothing of it stays on this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.chaos import training_workers
from pipeline import train
from pipeline.errors import RunFailed
from pipeline.report.run import run_page
from pipeline.runs.folder import RunFolder
from pipeline.ui.console import open_console
from tests.pipeline.training.test_train import Recorder
from tests.s3 import S3Server
from tests.waiting import wait_for


@pytest.mark.usefixtures("ray_session")
def test_a_run_on_s3_is_killed_and_continued(
    recipe: Any, own_s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers know neither address nor keys but by the filesystem that they are given; the weights are a local run's."""
    keys = {"num_epochs": 6, "eval_steps": 8, "save_steps": 8, "dpo_generate_during_eval": True, "load_best_model_at_end": True}
    quiet = train(recipe(tmp_path / "quiet", **keys))
    keys["profile"] = {"steps": [3, 4]}
    folder = RunFolder(own_s3.uri("runs/one"))

    def kill() -> None:
        wait_for(lambda: 8 in folder.checkpoints())
        training_workers()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunFailed, match="the checkpoint of step .* is complete, continue with --resume"):
        train(recipe(folder.path, **keys))
    killer.join()
    display = Recorder()
    result = train(recipe(folder.path, **keys), resume=True, display=display)
    assert any(note.startswith("continuing from the checkpoint of step") for note in display.notes)
    assert (result.run_dir, result.model_dir) == ("s3://bucket/runs/one", "s3://bucket/runs/one/model")
    assert result.history.dropna(subset=["loss"])["step"].tolist() == list(range(1, 25))
    assert result.history.dropna(subset=["eval_loss"])["step"].tolist() == [8, 16, 24]
    names = {key.removeprefix("runs/one/").partition("/")[0] for key in own_s3.objects()}
    assert {"config.yaml", "metrics.jsonl", "run.json", "model", "checkpoint-000024", "generations"} <= names
    assert "runs/one/generations/step-000024.jsonl" in own_s3.objects()
    traces = [key for key in own_s3.objects() if key.startswith("runs/one/profiles/")]
    assert traces == [f"runs/one/profiles/steps-3-4.rank-{rank}.json.gz" for rank in (0, 1)]
    assert "steps-3-4.rank-1.json.gz in s3://bucket/runs/one/profiles: open them" in run_page(folder)
    assert result.report == "s3://bucket/runs/one/report.html" and "runs/one/report.html" in own_s3.objects()
    page = run_page(folder)
    assert "policy, step 24</h3>" in page and "continued on " in page and " died: " in page
    check_model(own_s3, tmp_path / "model", quiet.model_dir)
    open_console().print(result)
    shown = capsys.readouterr().out
    assert "model   s3://bucket/runs/one/model" in shown and "report  s3://bucket/runs/one/report.html" in shown
    again = train(recipe(folder.path, **keys), resume=True, display=display)
    assert "already finished with step 24: s3://bucket/runs/one" in display.notes[-1]
    assert again.metrics == result.metrics


def check_model(own_s3: S3Server, downloaded: Path, quiet: Path) -> None:
    """It loads, and has the weights of the quiet run."""
    downloaded.mkdir()
    own_s3.download("runs/one/model", str(downloaded))
    assert AutoModelForCausalLM.from_pretrained(downloaded).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(downloaded).chat_template
    mine, theirs = (load_file(path / "model.safetensors") for path in (downloaded, quiet))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0)


@pytest.mark.usefixtures("ray_session")
def test_a_store_that_goes_away_costs_nothing_but_time(recipe: Any, own_s3: S3Server, tmp_path: Path) -> None:
    """An outage in the middle of training, with checkpoints under way: workers, Ray and the driver wait."""
    folder = RunFolder(own_s3.uri("runs/two"))

    def go_away() -> None:
        wait_for(lambda: 2 in folder.checkpoints())
        own_s3.be_away(requests=20)

    outage = threading.Thread(target=go_away)
    outage.start()
    result = train(recipe(folder.path, num_epochs=6, save_steps=2, eval_steps=8, save_total_limit=3))
    outage.join()
    assert result.history.dropna(subset=["loss"])["step"].tolist() == list(range(1, 25))
    assert folder.checkpoints()[-1] == 24
    assert folder.finished_steps() == 24
