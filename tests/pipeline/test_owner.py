"""One process writes an output_dir at a time; the next one is told who. The mechanism's own tests are in `test_lease.py`."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.io import lease
from pipeline.io.holder import here
from pipeline.io.retry import waits
from pipeline.io.storage import Folder
from pipeline.runs.owner import OWNER, owned
from tests.leases import another, holder_of, take_over
from tests.waiting import wait_for


@pytest.fixture(params=["path", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run" if request.param == "path" else request.getfixturevalue("s3").uri("run"))


def refused(folder: Folder, message: str) -> None:
    with pytest.raises(UserError, match=f"^output_dir: .* is being written by {message}"), owned(folder):
        pass


def test_the_second_is_told_and_the_third_comes_after(folder: Folder) -> None:
    with owned(folder):
        refused(folder, r"process \d+ on .* since \d+:\d+:\d+; wait for its end or stop it, or give another output_dir$")
    assert holder_of(folder, OWNER) is None
    with owned(folder):
        pass


def test_nothing_is_left_of_a_folder_that_nothing_was_written_to(tmp_path: Path) -> None:
    with owned(Folder(tmp_path / "run")):
        assert (tmp_path / "run" / OWNER).is_dir()
    assert not (tmp_path / "run").exists()


def test_records_of_earlier_versions(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, also on a path; the lock beside it, and a truncated record, are nobody's."""
    monkeypatch.setattr(lease, "POLL_S", 0.1)
    monkeypatch.setattr(lease, "UNREADABLE", replace(lease.UNREADABLE, validity=0.2))
    folder.create()
    folder.write(".owner.lock", "")
    own = {"machine": here().machine, "host": "node-7", "started": 0.0, "since": 0.0, "beat": 0}
    for record in ({"id": "a", "process": 2**30, **own}, "half"):
        folder.write(OWNER, json.dumps(record)[:-1] if record == "half" else json.dumps(record))
        with owned(folder):
            assert (holder_of(folder, OWNER) or another()).host != "node-7"
    old = {**own, "id": "a", "process": 7, "machine": "another", "of a later version": {}}
    folder.write(OWNER, json.dumps(old))
    with ThreadPoolExecutor() as threads:
        asking = threads.submit(refused, folder, "process 7 on node-7")
        wait_for(lambda: any("a sign of life of process 7 on node-7" in wait for wait in waits))
        folder.write(OWNER, json.dumps({**old, "beat": 1}))
        asking.result()


def test_an_owner_that_lost_its_folder_is_told(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was away for long, and another has taken over."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    with owned(folder) as ownership:
        assert not ownership.is_lost
        take_over(folder, OWNER, another())
        wait_for(lambda: ownership.is_lost)
        assert "was taken over by process 7 on node-7 while this process gave no sign of life" in ownership.message()
        assert str(holder_of(folder, OWNER)) == "process 7 on node-7"
        folder.delete(OWNER)  # the other one has ended
        time.sleep(0.3)
        assert ownership.is_lost and holder_of(folder, OWNER) is None
