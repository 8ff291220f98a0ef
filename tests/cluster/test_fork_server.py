"""Programs that a server's copies run, as Python itself would have run them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.local_workers import fork_server
from tests.waiting import wait_for

PROGRAM = """
import json, os, random, sys
import numpy
print(json.dumps({
    "arguments": sys.argv[1:], "name": __name__, "folder": os.getcwd(), "word": os.environ.get("WORD"),
    "number": float(numpy.random.random()), "imported": "json.tool" in sys.modules, "group": os.getpgid(0) == os.getpid(),
}))
sys.stdout.flush()
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def command() -> list[str]:
    """A server of this process."""
    return shlex.split(fork_server.start(["json.tool", "numpy"], os.environ))


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "program.py").write_text(PROGRAM)
    return str(tmp_path / "program.py")


IMPORTS = "import os, time; from cluster.local_workers.fork_server import start"


def test_a_program_runs_as_python_would_run_it(command: list[str], program: str, tmp_path: Path) -> None:
    environment = {**os.environ, "WORD": "here"}
    runs = [
        subprocess.run([*command, program, "3", "x y"], cwd=tmp_path, env=environment, capture_output=True, check=False)
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [3, 3], runs[0].stderr
    first, second = (json.loads(run.stdout) for run in runs)
    expected = {"arguments": ["3", "x y"], "name": "__main__", "folder": str(tmp_path), "word": "here"}
    assert first == {**expected, "number": first["number"], "imported": True, "group": True}
    assert first["number"] != second["number"]


def test_an_error_is_the_programs(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("raise KeyError('lost')")
    run = subprocess.run([*command, str(tmp_path / "program.py")], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.strip().endswith("KeyError: 'lost'")


@pytest.mark.parametrize("victim", ["client", "program"])
def test_killing_either_ends_both(command: list[str], tmp_path: Path, victim: str) -> None:
    (tmp_path / "program.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    client = subprocess.Popen([*command, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    program = psutil.Process(int(client.stdout.readline()))
    server = psutil.Process(program.ppid())
    os.kill(client.pid if victim == "client" else program.pid, signal.SIGKILL)
    assert client.wait(timeout=300) == (-signal.SIGKILL if victim == "client" else 128 + signal.SIGKILL)
    program.wait(timeout=300)
    test_an_error_is_the_programs(command, tmp_path)
    assert server.status() != psutil.STATUS_ZOMBIE


def test_both_may_be_killed_at_once(command: list[str], tmp_path: Path) -> None:
    """Their ends reach the server in the same moment, here because it was stopped before."""
    (tmp_path / "program.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    client = subprocess.Popen([*command, str(tmp_path / "program.py")], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    program = psutil.Process(int(client.stdout.readline()))
    server = psutil.Process(program.ppid())
    server.suspend()
    program.kill()
    wait_for(lambda: program.status() == psutil.STATUS_ZOMBIE)  # the end that the server hears of first
    client.kill()
    client.wait()
    server.resume()
    test_an_error_is_the_programs(command, tmp_path)
    assert server.status() != psutil.STATUS_ZOMBIE  # Python would have run the program without a server too


def test_without_a_server_python_runs_the_program(command: list[str], program: str, tmp_path: Path) -> None:
    alone = [*command[:-1], str(tmp_path / "nothing")]
    run = subprocess.run([*alone, program, "4"], capture_output=True, check=False)
    assert run.returncode == 4
    assert json.loads(run.stdout)["imported"] is False


def test_the_server_ends_with_whoever_started_it(tmp_path: Path) -> None:
    script = f"{IMPORTS}; print(start([], os.environ), flush=True); time.sleep(99)"
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    socket = Path(driver.stdout.readline().split()[-1])
    assert socket.exists()
    driver.kill()
    driver.wait()
    wait_for(lambda: not socket.parent.exists())


def test_a_server_that_imported_ray_serves_nobody(tmp_path: Path) -> None:
    """Its copies would be workers of no job: what Ray's extension reads when it is loaded would be the server's."""
    script = f"{IMPORTS}; print(start(['ray'], os.environ)); time.sleep(20)"
    driver = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert driver.stderr is not None
    lines = iter(driver.stderr.readline, "")
    assert any("RuntimeError: Ray was imported" in line for line in lines)
    driver.kill()
