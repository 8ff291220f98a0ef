"""A sweep whose driver is killed goes on: what had finished stays, what ran goes on from its checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pipeline.config import RunConfig
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.runs.scratch import scratch_of
from pipeline.tuning.folder import SweepFolder, recipe_text
from tests.pipeline.tuning.test_hosts import LORA
from tests.waiting import WAIT_S, wait_for

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.driver
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(*arguments)`: a driver; one that still runs when the test has failed is killed, and its Ray ends with it."""
    drivers: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipeline", "tune", *arguments, "--quiet"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        drivers.append(subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes))
        return drivers[-1]

    yield run
    for driver in drivers:
        driver.kill()


@pytest.fixture
def long(recipe: Any, tmp_path: Path) -> RunConfig:
    """One trial after the other, each with the whole machine; the second one takes its time."""
    section = {
        "space": {"num_epochs": {"grid": [1, 16]}, "learning_rate": {"grid": [1e-5]}},
        "search": "grid",
        "baseline": False,
        "max_concurrent_trials": 1,
        "max_failures": 1,
    }
    workers = {"resources_per_worker": {"CPU": os.cpu_count()}}
    return recipe(tmp_path / "sweep", section, eval_steps=8, save_steps=8, ray=workers)


def stop(driver: subprocess.Popen[str], run: RunFolder, beyond: int, how: signal.Signals) -> tuple[str, int]:
    """End the driver when the run has a checkpoint beyond a step; returns what it said, and its newest checkpoint."""
    wait_for(lambda: driver.poll() is not None or run.last_checkpoint() > beyond)
    assert driver.poll() is None, driver.stdout and driver.stdout.read()
    os.kill(driver.pid, how)
    said, _ = driver.communicate(timeout=300)
    return said, run.last_checkpoint()


def trials_of(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of `TrialRun`, as Tune wraps it."""
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [child] * ("ResourceTrainable" in " ".join(child.cmdline()))
    return found


def test_a_stopped_sweep_goes_on(start: Start, long: RunConfig, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    (tmp_path / "recipe.yaml").write_text(recipe_text(long))
    second = RunFolder(sweep / "trials" / "001")
    driver = start(str(tmp_path / "recipe.yaml"))
    said, first_stop = stop(driver, second, 0, signal.SIGTERM)
    assert driver.returncode == 143
    assert f"stopped by SIGTERM; continue with `prefray tune --resume {sweep}`" in said
    model = sweep / "trials" / "000" / "model" / "model.safetensors"
    made = model.stat().st_mtime_ns

    driver = start("--resume", str(sweep))
    wait_for(lambda: driver.poll() is not None or second.last_checkpoint() > first_stop)
    (trial,) = wait_for(lambda: trials_of(driver))
    killed_at = second.last_checkpoint()
    trial.kill()
    said, second_stop = stop(driver, second, killed_at, signal.SIGKILL)
    assert re.search(r"trial 1 failed at step \d+/128 and is tried again: ", said) and "Traceback" not in said
    assert second.finished_steps() is None

    driver = start("--resume", str(sweep))
    said, _ = driver.communicate(timeout=WAIT_S)
    assert driver.returncode == 0, said
    assert model.stat().st_mtime_ns == made
    goes_on = re.search(r"trial 1: continuing from the checkpoint of step (\d+)", said)
    assert goes_on is not None and int(goes_on[1]) >= second_stop
    records = SweepFolder(sweep).records()
    assert [(record.status, record.step) for record in records] == [("finished", 8), ("finished", 128)]
    assert yaml.safe_load((sweep / "best.yaml").read_text())["num_epochs"] in (1, 16)


def test_a_killed_sweep_of_slots_goes_on(start: Start, recipe: Any, tmp_path: Path) -> None:
    """Each trial from its own last checkpoint; nothing of the first driver stays."""
    sweep = tmp_path / "sweep"
    section = {"space": {"learning_rate": {"grid": [1e-4, 1e-3]}}, "search": "grid", "baseline": False, "slots": 2}
    keys = {"num_epochs": 10, "save_steps": 8, "eval_steps": 40, "ray": {"resources_per_worker": {"CPU": os.cpu_count()}}}
    (tmp_path / "recipe.yaml").write_text(recipe_text(recipe(sweep, section, **keys, **LORA)))
    runs = [RunFolder(sweep / "trials" / name) for name in ("000", "001")]
    driver = start(str(tmp_path / "recipe.yaml"))
    wait_for(lambda: driver.poll() is not None or all(run.last_checkpoint() > 0 for run in runs))
    family = psutil.Process(driver.pid).children(recursive=True)
    stop(driver, runs[0], 0, signal.SIGKILL)
    wait_for(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family))
    former = [scratch_of(run.known()["scratch"]) for run in runs]

    driver = start("--resume", str(sweep))
    said, _ = driver.communicate(timeout=WAIT_S)
    assert driver.returncode == 0, said
    assert said.count("continuing from the checkpoint of step") == 2
    assert [(record.status, record.step) for record in SweepFolder(sweep).records()] == [("finished", 80)] * 2
    for run in runs:
        assert [row["step"] for row in MetricsFile(run.ledger).read()] == list(range(1, 81))
    assert not [folder for folder in (sweep / "hosts", *former) if folder.exists()]
