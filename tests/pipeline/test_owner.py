"""One process writes a folder at a time; the next one is told who, and finds it free when that one is dead."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.io.retry import waits
from pipeline.io.storage import Folder
from pipeline.runs import owner
from pipeline.runs.owner import OWNER, owned
from tests.s3 import Bucket
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from pipeline.runs.owner import owned
from pipeline.io.storage import Folder
with owned(Folder(Path(sys.argv[1]))):
    print("has it", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=["path", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(owner, "RACE_S", 0.3)
    if request.param == "path":
        return Folder(tmp_path / "run")
    return Folder(request.getfixturevalue("s3").uri("run"))


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.1)
    monkeypatch.setattr(owner, "EXPIRY_S", 2.0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `run`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


def refused(folder: Folder, message: str) -> None:
    with pytest.raises(UserError, match=f"output_dir: .* is being written by {message}"), owned(folder):
        pass


def test_the_second_is_told_and_the_third_comes_after(folder: Folder) -> None:
    with owned(folder):
        refused(folder, r"process \d+ on .* since .*; wait for its end or stop it, or give another output_dir")
        assert folder.read(OWNER) is not None
    assert folder.read(OWNER) is None
    with owned(folder):
        pass


def test_nothing_is_left_of_a_folder_that_nothing_was_written_to(tmp_path: Path) -> None:
    with owned(Folder(tmp_path / "run")):
        assert (tmp_path / "run" / OWNER).is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
def test_a_process_that_was_killed_owns_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    folder = Folder(tmp_path / "run")
    refused(folder, f"process {holder.pid} on ")
    holder.kill()
    holder.wait()
    assert folder.read(OWNER) is not None
    with owned(folder):
        assert json.loads(folder.read(OWNER) or "")["process"] != holder.pid


def on_another_machine(**changes: Any) -> str:
    return json.dumps({**owner._here(), "machine": "another", "host": "node-7", **changes})


@pytest.mark.usefixtures("quickly")
def test_signs_of_life_of_another_machine_are_waited_for(folder: Folder) -> None:
    folder.create()
    folder.write(OWNER, on_another_machine(process=7))
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(refused, folder, "process 7 on node-7")
        wait_for(lambda: any("a sign of life of process 7 on node-7" in wait for wait in waits))
        folder.write(OWNER, on_another_machine(process=7, id=json.loads(folder.read(OWNER) or "")["id"], beat=1))
        asking.result()
    with owned(folder):  # which gives no more signs
        assert json.loads(folder.read(OWNER) or "")["host"] != "node-7"


@pytest.mark.usefixtures("quickly")
def test_signs_of_life_are_given(folder: Folder) -> None:
    with owned(folder):
        wait_for(lambda: json.loads(folder.read(OWNER) or "")["beat"] >= 3)


def test_of_two_that_take_a_folder_of_a_store_at_once_one_has_it(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both find it free; who has written last stays."""
    monkeypatch.setattr(owner, "RACE_S", 0.5)
    both, done = threading.Barrier(2), threading.Barrier(2)

    def take() -> bool:
        both.wait()
        try:
            with owned(Folder(s3.uri("run"))):
                done.wait()
                return True
        except UserError:
            done.wait()
            return False

    monkeypatch.setattr(owner, "_is_alive", lambda *_: False)
    with ThreadPoolExecutor() as threads:
        found = [one.result() for one in [threads.submit(take) for _ in range(2)]]
    assert sorted(found) == [False, True]


def test_half_a_record_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text('{"id": "a"')
    with owned(Folder(tmp_path)):
        pass


def test_an_owner_that_lost_its_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for long, and another has taken over."""
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    with owned(Folder(tmp_path)) as ownership:
        assert not ownership.is_lost
        Folder(tmp_path).write(OWNER, json.dumps({"id": "another", "process": 1, "beat": 0}))
        wait_for(lambda: ownership.is_lost)
        assert json.loads((tmp_path / OWNER).read_text())["id"] == "another"
        (tmp_path / OWNER).unlink()  # the other one has ended
        time.sleep(0.3)
        assert ownership.is_lost and not (tmp_path / OWNER).exists()
