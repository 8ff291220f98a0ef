"""Processes that are killed, and processes at the same time: every forward is run once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import score
from pipeline.config import dump_config
from tests.pipeline.reference.conftest import ROWS_PER_TASK
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]

RUN = """
import sys, time
from pathlib import Path
import ray

def count_forwards():
    # in every worker process: each forward of a reference leaves a mark when it has run
    from pipeline.reference.actor import ReferenceActor
    load = ReferenceActor._load
    def counted(self):
        scorer = load(self)
        def mark(*_):
            with open({counter!r}, "a") as file:
                file.write("x")
            while Path({counter!r}).stat().st_size >= {until} and not Path({gate!r}).exists():
                time.sleep(0.02)
        scorer.model.register_forward_hook(mark)
        return scorer
    ReferenceActor._load = counted

runtime_env = {{"worker_process_setup_hook": count_forwards, "env_vars": {{"PYTHONPATH": {root!r}}}}}
ray.init(address={address!r}, log_to_driver=False, runtime_env=runtime_env)
from pipeline import load_config, prepare, score
cfg = load_config({recipe!r})
scores = score(cfg, prepare(cfg), rows_per_task={rows_per_task})
print("done", scores.forwards, flush=True)
"""


class Process:
    """A process that scores in this test's Ray, counts the forwards of its reference, and stops after some of them."""

    def __init__(self, ray: Any, cfg: Any, folder: Path, until: int) -> None:
        folder.mkdir()
        recipe, self.counter, self.gate = (folder / name for name in ("recipe.yaml", "forwards", "go-on"))
        recipe.write_text(dump_config(cfg))
        self.counter.write_text("")
        code = RUN.format(
            root=str(ROOT),
            counter=str(self.counter),
            until=until,
            gate=str(self.gate),
            address=ray.get_runtime_context().gcs_address,
            recipe=str(recipe),
            rows_per_task=ROWS_PER_TASK,
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)

    @property
    def forwards(self) -> int:
        return len(self.counter.read_text())

    def wait_for(self, forwards: int) -> None:
        wait_for(lambda: self.forwards >= forwards or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()


@pytest.fixture
def copied_data(recipe: Any, prepared: Any, tmp_path: Path) -> Any:
    """A recipe over a copy of the prepared data, without scores."""
    import shutil

    shutil.copytree(prepared.path, tmp_path / "prepared" / prepared.fingerprint)
    return recipe(dataset_prepared_path=str(tmp_path / "prepared"))


@pytest.mark.driver
def test_a_killed_run_is_continued_by_one_of_two_at_once(
    ray_session: Any, copied_data: Any, prepared: Any, scores: Any, tmp_path: Path
) -> None:
    half = scores.forwards // 2
    killed = Process(ray_session, copied_data, tmp_path / "killed", until=half)
    killed.wait_for(half)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.communicate()
    folder = tmp_path / "prepared" / "reference" / scores.fingerprint
    done = [*folder.glob("staging/*.parquet"), *folder.glob("*/part-*.parquet")]
    assert done
    assert not (folder / "manifest.json").exists()

    following = Process(ray_session, copied_data, tmp_path / "next", until=2)
    following.wait_for(2)
    seen: list[dict[str, Any]] = []

    def go_on(state: dict[str, Any]) -> None:
        seen.append(state)
        following.gate.touch()

    mine = score(copied_data, prepared, progress=go_on, rows_per_task=ROWS_PER_TASK)  # while the other is at it
    assert [state.get("waiting") for state in seen] == [f"process {following.process.pid} on {socket.gethostname()}"]
    output, errors = following.process.communicate(timeout=300)
    assert output.split() == ["done", str(following.forwards)], errors
    assert mine.forwards == 0
    # What was in flight is repeated: one task, of at most as many forwards as it has rows, and one that Ray had queued.
    in_flight = 2 * -(-scores.forwards // 6)
    assert following.forwards < scores.forwards <= killed.forwards + following.forwards <= scores.forwards + in_flight
    assert mine.manifest == scores.manifest
