"""Runs that report to four trackers at once: one run in each, whatever happens to workers."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from benchmarks.chaos import training_workers
from pipeline import TrainResult, train
from pipeline.runs.folder import RunFolder
from pipeline.ui.display import SilentDisplay
from tests.trackers import offline_runs, scalars, trackio_runs
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("ray_session")

STEPS = list(range(1, 45))


class Notes(SilentDisplay):
    """A display that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def notes() -> list[str]:
    return []


@pytest.fixture(scope="module")
def run(ray_session: Any, recipe: Any, trackers: dict[str, Any], notes: list[str], tmp_path_factory: Any) -> TrainResult:
    """40 steps on two workers, one of which is killed after the checkpoint of step 8; then four steps more by --resume."""
    folder, display = RunFolder(tmp_path_factory.mktemp("runs") / "mine"), Notes()
    keys = {**trackers, "eval_steps": 20, "save_steps": 8}

    def kill() -> None:
        wait_for(lambda: 8 in folder.checkpoints())
        training_workers()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    train(recipe(folder.path, **keys, num_epochs=10, ray={"num_workers": 2, "max_failures": 1}), display=display)
    killer.join()
    assert any("restarting from the checkpoint" in note for note in display.notes)
    notes += display.notes
    return train(recipe(folder.path, **keys, num_epochs=11, ray={"num_workers": 2, "max_failures": 1}), resume=True)


def kept(run: TrainResult) -> dict[str, Any]:
    return json.loads((Path(run.run_dir) / "trackers.json").read_text())


def test_the_display_says_where_they_are(run: TrainResult, notes: list[str], server: str) -> None:
    assert any(note.startswith(f"MLflow: {server}/#/experiments/") for note in notes)
    assert f"TensorBoard: tensorboard --logdir {run.run_dir}" in notes
    assert "trackio: trackio show --project tests" in notes
    assert not [note for note in notes if "has failed" in note or "hasn't taken" in note]


def test_mlflow_has_one_run_that_finished(run: TrainResult, server: str) -> None:
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found = [one for one in client.search_runs([experiment.experiment_id]) if one.info.run_name == "mine"]
    assert [one.info.run_id for one in found] == [kept(run)["mlflow"]["id"]]
    assert found[0].info.status == "FINISHED"
    assert found[0].data.params["learning_rate"] == "0.001" and found[0].data.params["ray.num_workers"] == "2"
    assert "sweep" not in found[0].data.tags
    history = client.get_metric_history(found[0].info.run_id, "loss")
    assert sorted(point.step for point in history) == STEPS
    assert found[0].data.metrics["loss"] == pytest.approx(run.history.dropna(subset=["loss"])["loss"].iloc[-1])
    assert found[0].data.metrics["eval_rewards/accuracies"] == run.metrics["eval_rewards/accuracies"]


def test_tensorboard_has_every_step_once(run: TrainResult) -> None:
    found = scalars(Path(run.run_dir) / "tensorboard")
    assert [step for step, _ in found["loss"]] == STEPS
    losses = run.history.dropna(subset=["loss"])["loss"].tolist()
    assert [value for _, value in found["loss"]] == pytest.approx(losses, rel=1e-5)
    assert [step for step, _ in found["eval_rewards/margins"]] == [20, 40, 44]
    assert "config/text_summary" not in found


def test_wandb_has_one_id_and_every_step_once(run: TrainResult) -> None:
    """Offline it makes a folder for each time that it goes on; uploaded, they are one run."""
    found = offline_runs(Path(run.run_dir) / "wandb")
    assert [one.id for one in found] == [kept(run)["wandb"]["id"]] * 2
    assert [one.name for one in found] == ["mine", "mine"]
    assert {(one.project, one.group, one.exit_code) for one in found} == {("tests", "", 0)}
    assert found[0].config["learning_rate"] == 1e-3 and found[0].config["ray"]["num_workers"] == 2
    assert [step for one in found for step in one.steps_of("loss")] == STEPS
    assert [step for one in found for step in one.steps_of("eval_loss")] == [20, 40, 44]


def test_trackio_has_one_run(run: TrainResult, trackio_dir: Path) -> None:
    found = trackio_runs(trackio_dir, "tests")
    assert found["mine"]["steps"]["loss"] == STEPS
    assert found["mine"]["config"]["learning_rate"] == 1e-3
    assert not [name for name in found if name.startswith("mine") and name != "mine"]
