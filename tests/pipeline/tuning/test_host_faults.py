"""What goes wrong while trials share a base, and what people ask of such a sweep."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ray_compat import remove_orphaned_groups
from pipeline import open_sweep, tune
from pipeline.errors import UserError
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.runs.scratch import scratch_of
from pipeline.tuning.folder import SweepFolder
from pipeline.tuning.result import SweepResult
from tests.pipeline.tuning.test_hosts import LORA, Notes
from tests.waiting import wait_for

pytestmark = pytest.mark.usefixtures("ray_session")
WHOLE_MACHINE = {"resources_per_worker": {"CPU": 2}}
RATES = {"space": {"learning_rate": {"grid": [1e-4, 1e-3]}}, "search": "grid", "baseline": False}


def processes(kind: str) -> list[psutil.Process]:
    """Actors of a class, among those of this process's Ray."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [child] * (kind in " ".join(child.cmdline()))
    return found


def check_ledgers(result: SweepResult) -> None:
    """Every step of every finished trial is there once."""
    for record in result.records:
        if record.status == "finished":
            ledger = MetricsFile(RunFolder(Path(str(result.run_dir), "trials", str(record.folder))).ledger).read()
            assert [row["step"] for row in ledger] == list(range(1, record.total_steps + 1))


def check_nothing_is_left(where: Path) -> None:
    """Neither folders nor actors."""
    assert not (where / "hosts").exists()
    states = [json.loads(path.read_text()) for path in where.glob("trials/*/run.json")]
    scratch = [scratch_of(state["scratch"]) for state in states if "scratch" in state]
    wait_for(lambda: not [folder for folder in scratch if folder.exists()])
    wait_for(lambda: not any(map(processes, ("TrainController", "RayTrainWorker", "ResourceTrainable"))))
    assert remove_orphaned_groups() == 0


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Act in another thread, whose errors are raised at the end."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    if errors:
        raise errors[0]


def test_trials_that_bear_no_others_are_tried_alone(recipe: Any, tmp_path: Path) -> None:
    """One runs out of memory, another one kills the worker of all: the third one goes on, and no failure was allowed."""
    # Of the plugin, which isn't imported: it would register its callback for all tests of this process.
    greedy, deadly = 2e-4, 3e-4
    section = {**RATES, "space": {"learning_rate": {"grid": [1e-4, greedy, deadly]}}, "metric": "eval_rewards/accuracies"}
    plugin = {"plugins": ["tests.pipeline.tuning.bad_trials"]}
    where, display = tmp_path / "sweep", Notes()
    cfg = recipe(where, section, num_epochs=3, save_steps=8, eval_steps=16, ray=WHOLE_MACHINE, **plugin, **LORA)
    result = tune(cfg, display=display)
    assert [(one.status, one.step, one.reason) for one in result.records] == [("finished", 24, None)] * 3
    said = "\n".join(display.notes)
    assert "trial 1: it ran out of memory beside others: it is tried again with workers of its own" in said
    assert "trial 2: the workers that it shared died in its turn: it is tried again with workers of its own" in said
    assert re.search(r"trial 0: restarting from .*; it was another run's turn", said)
    assert said.count("with workers of its own") == 2
    check_ledgers(result)
    check_nothing_is_left(where)


def test_controller_and_trial_are_killed(recipe: Any, tmp_path: Path) -> None:
    """The trial's process is started again by Tune, the host by us; both trials go on from their own checkpoints."""
    where, display = tmp_path / "sweep", Notes()
    section = {**RATES, "max_failures": 1, "slots": 2}
    keys = {"num_epochs": 16, "save_steps": 8, "eval_steps": 64, "save_total_limit": 100}
    cfg = recipe(where, section, ray={**WHOLE_MACHINE, "max_failures": 1}, **keys, **LORA)
    runs = [RunFolder(where / "trials" / name) for name in ("000", "001")]

    def kill() -> None:
        wait_for(lambda: all(run.last_checkpoint() >= 8 for run in runs))
        processes("ResourceTrainable")[0].kill()
        wait_for(lambda: any("is tried again" in note for note in display.notes))
        wait_for(lambda: any("continuing from the checkpoint" in note for note in display.notes))
        processes("TrainController")[0].kill()

    with meanwhile(kill):
        result = tune(cfg, display=display)
    assert [(one.status, one.step) for one in result.records] == [("finished", 128)] * 2
    for number in range(2):
        assert any(note.startswith(f"trial {number}: restarting from the checkpoint of step") for note in display.notes)
    check_ledgers(result)
    check_nothing_is_left(where)


def test_slots_go_to_clones_and_finalists(recipe: Any, tmp_path: Path) -> None:
    where, said = tmp_path / "sweep", list[str]()
    section = {**RATES, "slots": 2, "metric": "eval_rewards/margins", "finalists": {"num": 1, "seeds": 3}}
    cfg = recipe(where, section, num_epochs=12, eval_steps=48, save_steps=8, save_total_limit=100, ray=WHOLE_MACHINE, **LORA)

    def person() -> None:
        wait_for(lambda: all(RunFolder(where / "trials" / name).last_checkpoint() for name in ("000", "001")))
        sweep = open_sweep(where)
        said.append(sweep.clone(1, {"learning_rate": 2e-3}, warm_start=True))
        said.append(sweep.clone(1, {"lora_r": 4}))
        said.append(sweep.stop(0))
        with pytest.raises(UserError, match="there is no trial 9; the sweep's trials are: 0, 1, 2, 3"):
            sweep.clone(9, {"lora_r": 4})

    with meanwhile(person):
        result = tune(cfg)
    assert said[0].startswith("trial 2 is a clone of trial 1 with") and said[2].startswith("trial 0 ends at step ")
    stopped, first, warm, cold, *repeats = result.records
    assert [one.status for one in result.records] == ["stopped", *["finished"] * 6], [one.reason for one in result.records]
    assert stopped.step < 96 and warm.origins[0].startswith("trial 1 at step ") and cold.clone_of == 1
    assert {one.repeats for one in repeats} <= {first.number, warm.number, cold.number}
    assert not any(one.shown_host == "own" for one in result.records)
    assert (SweepFolder(where).state() or {})["shared"]["starts"] == 1  # the finalists have slots of the search's host
    check_ledgers(result)
    check_nothing_is_left(where)


@pytest.mark.parametrize(
    "section",
    [
        {"scheduler": "median", "grace_period": 0.25, "num_samples": 4},
        {"scheduler": "hyperband", "reduction_factor": 2, "num_samples": 4},
        {"search": "optuna", "num_samples": 3, "max_concurrent_trials": 1},
    ],
    ids=["median", "hyperband", "optuna"],
)
def test_every_scheduler_and_search(recipe: Any, tmp_path: Path, section: dict[str, Any]) -> None:
    """And fewer trials at once than slots."""
    space = {"learning_rate": {"loguniform": [1e-7, 1e-2]}}
    common = {"space": space, "baseline": False, "slots": 2, "metric": "eval_rewards/margins"}
    where = tmp_path / "sweep"
    result = tune(recipe(where, {**common, **section}, evals_per_epoch=2, ray=WHOLE_MACHINE, **LORA))
    statuses = {one.status for one in result.records}
    assert "finished" in statuses and statuses <= {"finished", "stopped"}
    assert len(result.records) == section["num_samples"] and not any(one.shown_host == "own" for one in result.records)
    check_nothing_is_left(where)
