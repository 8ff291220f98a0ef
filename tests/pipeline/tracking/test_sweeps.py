"""Sweeps in trackers: a run for each trial, the sweep is their group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline import tune
from pipeline.config import RunConfig
from pipeline.tuning.result import SweepResult
from tests.trackers import offline_runs, scalars, trackio_runs

pytestmark = pytest.mark.usefixtures("ray_session")

RATES = [1e-4, 1e-3]
STEPS = list(range(1, 9))


@pytest.fixture(scope="module")
def sweep(ray_session: Any, recipe: Any, trackers: dict[str, Any], tmp_path_factory: Any) -> SweepResult:
    """Two learning rates, eight steps each."""
    section = {"space": {"learning_rate": {"grid": RATES}}, "search": "grid", "baseline": False}
    cfg: RunConfig = recipe(
        tmp_path_factory.mktemp("sweeps") / "my-sweep", **trackers, tune=section, ray={"num_workers": 1}, eval_steps=4
    )
    return tune(cfg)


def test_mlflow_nests_trials_in_the_sweep(sweep: SweepResult, server: str) -> None:
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent, *trials = found["my-sweep"], found["my-sweep/000"], found["my-sweep/001"]
    assert [run.info.status for run in (parent, *trials)] == ["FINISHED"] * 3
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {parent.info.run_id}
    assert {run.data.tags["sweep"] for run in trials} == {"my-sweep"}
    assert sorted(float(run.data.params["learning_rate"]) for run in trials) == RATES
    assert parent.data.params["tune.space.learning_rate.0.grid"] == str(RATES)
    assert parent.data.metrics["best/eval_rewards/accuracies"] == sweep.best_metrics["eval_rewards/accuracies"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"best.yaml", "report.html"}
    assert len([name for name in found if name.startswith("my-sweep")]) == 3


def test_tensorboard_tells_trials_apart(sweep: SweepResult) -> None:
    for name in ("000", "001"):
        found = scalars(Path(sweep.run_dir) / "trials" / name / "tensorboard")
        assert [step for step, _ in found["loss"]] == STEPS


def test_wandb_groups_trials(sweep: SweepResult) -> None:
    found = [run for name in ("000", "001") for run in offline_runs(Path(sweep.run_dir) / "trials" / name / "wandb")]
    assert [run.name for run in found] == ["my-sweep/000", "my-sweep/001"]
    assert {(run.group, run.exit_code) for run in found} == {("my-sweep", 0)}
    assert len({run.id for run in found}) == 2
    assert sorted(run.config["learning_rate"] for run in found) == RATES


def test_trackio_groups_trials(sweep: SweepResult, trackio_dir: Path) -> None:
    found = trackio_runs(trackio_dir, "tests")
    trials = [found["my-sweep/000"], found["my-sweep/001"]]
    assert {run["config"]["_Group"] for run in trials} == {"my-sweep"}
    assert sorted(run["config"]["learning_rate"] for run in trials) == RATES
    assert all(run["steps"]["loss"] == STEPS for run in trials)
