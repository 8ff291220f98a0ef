"""A command that shows nothing says what it waits for."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import prepare
from pipeline.io.retry import waiting_for, waits
from pipeline.io.storage import Folder
from pipeline.ui import waiting
from pipeline.ui.display import SilentDisplay
from pipeline.ui.waiting import WatchedDisplay
from tests.recipes import small_recipe
from tests.waiting import wait_for

HOG = """
import ray, sys, time
_, address, holds = sys.argv
ray.init(address=address, log_to_driver=False)

@ray.remote(num_cpus=2)
def hold():
    open(holds, "w").close()
    time.sleep(600)

ray.get(hold.remote())
"""


class Notes(SilentDisplay):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        self.told.append(text)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Notes:
    monkeypatch.setattr(waiting, "SILENCE_S", 0.2)
    monkeypatch.setattr(waiting, "unmet_demand", lambda: "a CPU")
    return Notes()


@pytest.fixture
def watched(notes: Notes) -> Iterator[WatchedDisplay]:
    display = WatchedDisplay(notes)
    yield display
    display.close()


def test_what_blocks_is_told_once(watched: WatchedDisplay, notes: Notes) -> None:
    with waiting_for("storage, at s3://bucket"):
        wait_for(lambda: bool(notes.told))
        watched.look()
    assert notes.told == ["waiting for storage, at s3://bucket"]


def test_storage_is_waited_for_while_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = Folder(tmp_path), []

    class Asked:
        def __getattr__(self, name: str) -> Any:
            seen.append(list(waits))
            return getattr(folder.resolved, name)

    monkeypatch.setattr(folder, "filesystem", Asked())
    assert folder.names() == [] and folder.read("none") is None and not folder.has_folder("none")
    assert seen == [[f"storage, at {tmp_path}"]] * 3 and not waits


def test_a_stage_that_shows_something_waits_for_nothing(watched: WatchedDisplay, notes: Notes) -> None:
    watched.stage("preparing data")
    watched.look()
    assert not notes.told
    wait_for(lambda: notes.told == ["waiting for a CPU"])
    watched.progress({})
    wait_for(lambda: notes.told == ["waiting for a CPU"] * 2)


def test_steps_take_as_long_as_they_take(watched: WatchedDisplay, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENCE_S", 0.0)
    watched.record({"step": 1})
    watched.look()
    assert not notes.told


def test_a_display_that_is_forgotten_is_not_watched(notes: Notes) -> None:
    WatchedDisplay(notes)
    wait_for(lambda: not any(thread.name == "waiting" for thread in threading.enumerate()))


@pytest.mark.driver
def test_cpus_that_another_job_holds(ray_session: Any, tiny_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "SILENCE_S", 1.0)
    address, holds = ray_session.get_runtime_context().gcs_address, tmp_path / "holds"
    hog = subprocess.Popen([sys.executable, "-c", HOG, address, str(holds)])
    try:
        wait_for(holds.exists)

        class Freed(Notes):
            def note(self, text: str) -> None:
                super().note(text)
                hog.kill()

        notes = Freed()
        display = WatchedDisplay(notes)
        cfg = small_recipe(tiny_base, tmp_path)(tmp_path / "run")
        assert prepare(cfg, progress=display.progress).train_rows == 32
        display.close()
    finally:
        hog.kill()
    assert notes.told[0].startswith("waiting for 1 x {CPU: 1}, where 0 of 2 CPU are free; other jobs on the cluster: `")
    assert f"(process {hog.pid} on " in notes.told[0]
