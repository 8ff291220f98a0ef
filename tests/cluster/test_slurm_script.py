"""The script for Slurm, run with stand-ins for Slurm's commands and Ray's."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.manifests import slurm
from tests.cluster.manifest_requests import RECIPE, REQUESTS, request_for
from tests.cluster.slurm_standins import Job


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Makes the job of a request."""
    made: list[Job] = []

    def make(**changes: Any) -> Job:
        made.append(Job(tmp_path, slurm(request_for(min_nodes=3, max_nodes=3, cpus=8, gpus=2, **changes))))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.parametrize("name", REQUESTS)
def test_bash_and_shellcheck_find_nothing(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(slurm(REQUESTS[name]))
    subprocess.run(["bash", "-n", str(script)], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck here")
    found = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_head_starts_first_the_run_last_and_all_of_it_ends(tmp_path: Path, job: Callable[..., Job]) -> None:
    given = job()
    assert given.run(STATUS="0")[0] == 0
    log = given.log()
    assert [line.split()[0] for line in log] == ["head", "worker", "worker", "wait", "run", "end", "end", "end"]
    assert log[0].startswith("head a token token-of-the-job start --block --num-cpus=8 --num-gpus=2 ")
    assert "--dashboard-host=127.0.0.1" in log[0] and "--port=20002" in log[0]
    assert sorted(line.split()[1] for line in log[1:3]) == ["b", "c"]
    assert all(line.endswith("--address=10.0.0.1:20002") for line in log[1:3])
    assert log[3:5] == ["wait for 3 nodes at 10.0.0.1:20002", "run -m pipeline train RECIPE at 10.0.0.1:20002"]
    assert sorted(log[5:]) == ["end a", "end b", "end c"]
    assert (tmp_path / "log.recipe").read_text() == RECIPE
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_status_is_that_of_the_run(job: Callable[..., Job]) -> None:
    given = job()
    assert given.run(STATUS="3")[0] == 3
    assert sorted(given.log()[-3:]) == ["end a", "end b", "end c"]


@pytest.mark.parametrize(("number", "goes_on"), [(signal.SIGTERM, False), (signal.SIGUSR1, True)])
def test_a_run_that_is_told_to_end_saves_first(job: Callable[..., Job], number: signal.Signals, goes_on: bool) -> None:
    given = job()
    process = given.start()
    given.wait_for("run ")
    process.send_signal(number)
    assert process.wait(timeout=300) == 143
    ends = ["saved", "end a", "end b", "end c"]
    log = given.log()[5:]
    assert sorted(log[1:4]) == ends[1:] and log[0] == "saved"
    assert log[4:] == (["scontrol requeue 70001"] if goes_on else [])


def test_a_run_that_fails_near_the_time_limit_does_not_go_on(tmp_path: Path, job: Callable[..., Job]) -> None:
    given = job()
    (tmp_path / "bin" / "python").write_text((tmp_path / "bin" / "python").read_text().replace("exit 143", "exit 1"))
    process = given.start()
    given.wait_for("run ")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 1
    assert "scontrol requeue 70001" not in given.log()


def test_a_head_that_does_not_start_is_said_at_once(job: Callable[..., Job]) -> None:
    status, words = job().run(HEAD_FAILS="yes")
    assert status == 1
    assert "prefray: Ray's head could not be started" in words


@pytest.mark.parametrize(
    ("restarts", "resume", "words"),
    [("0", False, "train RECIPE at"), ("2", False, "train RECIPE --resume at"), ("0", True, "train RECIPE --resume at")],
)
def test_a_run_goes_on_after_it_was_queued_again(job: Callable[..., Job], restarts: str, resume: bool, words: str) -> None:
    given = job(resume=resume)
    given.run(STATUS="0", SLURM_RESTART_COUNT=restarts)
    assert given.log()[4].startswith(f"run -m pipeline {words} ")


def test_a_sweep_goes_on_once_it_has_begun(tmp_path: Path, job: Callable[..., Job]) -> None:
    folder = tmp_path / "a sweep"
    given = job(command="tune", output_dir=str(folder), sweep_file=str(folder / "sweep.json"))
    given.run(STATUS="0", SLURM_RESTART_COUNT="1")
    assert given.log()[4].startswith("run -m pipeline tune RECIPE at")
    folder.mkdir()
    (folder / "sweep.json").touch()
    given.log_file.write_text("")
    given.run(STATUS="0", SLURM_RESTART_COUNT="1")
    assert given.log()[4].startswith(f"run -m pipeline tune --resume {folder} at")


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_the_allocation_is_that_of_the_recipe() -> None:
    given = {"time": "2-00", "partition": "gpu", "account": "lab"}
    found = directives(slurm(request_for(min_nodes=1, max_nodes=4, cpus=8, gpus=2, memory=96, **given)))
    assert found[:11] == [
        "--job-name=train-dpo",
        "--nodes=1-4",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--gpus-per-node=2",
        "--mem=96G",
        "--time=2-00",
        "--partition=gpu",
        "--account=lab",
        "--no-kill",
        "--requeue",
    ]
    assert "--signal=B:USR1@600" in found
    plain = directives(slurm(request_for()))
    assert "--nodes=1" in plain
    assert not {"--no-kill", "--partition=None"} & set(plain) and not any("gpus" in line or "mem" in line for line in plain)


def test_lines_of_ones_own_come_before_anything_runs() -> None:
    script = slurm(request_for(setup=("module load cuda", "source ~/venv/bin/activate")))
    assert "set -euo pipefail\nset +u\nmodule load cuda\nsource ~/venv/bin/activate\nset -u\n" in script


def test_a_recipe_cannot_end_its_own_quotation(tmp_path: Path, job: Callable[..., Job]) -> None:
    given = job(recipe_text="a: |\n  x\nRECIPE\nRECIPE_\n")
    given.run(STATUS="0")
    assert (tmp_path / "log.recipe").read_text() == "a: |\n  x\nRECIPE\nRECIPE_\n"


@pytest.mark.parametrize("limit", ["0:19:59", "19", "19:59", "0-0:19"])
def test_a_time_that_leaves_none_to_save(limit: str) -> None:
    with pytest.raises(ValueError, match=f"--time: {limit} is too short: 10 minutes before its end .* at least 20 minutes"):
        slurm(request_for(time=limit))


@pytest.mark.parametrize("limit", ["0:20:00", "20", "20:00", "0-0:20", "1-00", "1-00:00:00"])
def test_a_time_that_is_long_enough(limit: str) -> None:
    assert f"--time={limit}" in directives(slurm(request_for(time=limit)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"partition": "gpu\nrm -rf /"}, "--partition: names of Slurm's have letters"),
        ({"account": "a b"}, "--account: names of Slurm's have letters, .*; got 'a b'"),
        ({"setup": ("module load x\nrm y",)}, "--setup: is one line; give the option once for each"),
    ],
)
def test_lines_can_not_be_smuggled_in(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slurm(request_for(**given))


def test_what_slurm_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"--time: not as Slurm writes a time, such as 24:00:00 or 2-12:00:00: '1 day'"):
        slurm(request_for(time="1 day"))
    with pytest.raises(ValueError, match=r"--name: of a job of Slurm's: .*; got 'a b'"):
        slurm(request_for(name="a b"))
