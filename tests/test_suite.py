"""What holds the tests: marks, tiers, the budget of unmarked tests, failures that fit a screen, what is shared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.suite.output import cut
from tests.suite.sharing import make_once

ROOT = Path(__file__).parents[1]
CONFTEST = "from tests.suite.hooks import *"


@pytest.fixture
def run(tmp_path: Path):
    """`run(code, *options)`: pytest on a file of such tests, held as these here are; returns status and output."""

    def make(code: str, *options: str) -> tuple[int, str]:
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "test_it.py").write_text("import pytest\n" + textwrap.dedent(code))
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        variables["CI"] = "true"  # where pytest itself cuts nothing
        words = [
            sys.executable,
            "-m",
            "pytest",
            f"--rootdir={tmp_path}",
            "-c",
            os.devnull,
            "-p",
            "no:cacheprovider",
            "--tb=short",
        ]
        done = subprocess.run(
            [*words, *options, str(tmp_path)],
            cwd=tmp_path,
            env={**variables, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return make


BUSY = """
    import subprocess
    import sys
    import time

    def work():
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass

    @pytest.fixture(scope="session")
    def shared():
        work()

    @pytest.fixture(scope="module")
    def shared_by_a_file():
        work()

    def test_of_a_fixture_of_its_file(shared_by_a_file):
        pass

    def test_that_leaves_a_process():
        words = [sys.executable, "-c", "sum(range(4 * 10**7)); print(flush=True); input()"]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()

    def test_of_an_expensive_fixture(shared):
        pass

    @pytest.fixture(scope="session")
    def of_the_session():  # as Ray's nodes are, whose workers work and end at any time
        work = "subprocess.run([sys.executable, '-c', 'sum(range(8 * 10**7))'])"
        code = f"import subprocess, sys; {work}; print(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            yield process
            process.kill()

    @pytest.mark.driver
    def test_that_is_marked(of_the_session):
        work()

    def test_beside_others(of_the_session):
        of_the_session.stdout.readline()

    def test_that_waits():
        time.sleep(0.3)

    def test_that_works():
        work()

    def test_that_is_skipped_after_its_work():
        work()
        pytest.skip("not here")
"""


@pytest.mark.processes
@pytest.mark.parametrize("processes", [(), ("--numprocesses=1",)])
def test_a_run_fails_in_which_an_unmarked_test_was_expensive(run, processes) -> None:
    status, output = run(BUSY, "--budget=0.25", *processes)
    assert "7 passed" in output and status == 1, output
    assert "unmarked tests that took 0.25 s of processor time" in output
    named = output.split("or more")[1]
    for name in ("test_that_works", "skipped_after", "leaves_a_process", "fixture_of_its_file of shared_by_a_file"):
        assert name in named
    assert named.count("test_it.py::") == 4


TIERED = """
    @pytest.fixture
    def ray_session():
        pass

    def test_unmarked(): pass

    def test_on_ray(ray_session): pass

    @pytest.mark.browser
    def test_page(): pass

    @pytest.mark.release
    @pytest.mark.browser
    def test_pages(): pass
"""


@pytest.mark.processes
def test_tiers_are_everything(run, tmp_path: Path) -> None:
    """The main job runs in one process, since its tests share a Ray; other files go to any, those that take longest first."""
    for name in ("test_a.py", "test_b.py"):
        code = "import os\nimport pytest\n\npytestmark = pytest.mark.main_job\n\n\n@pytest.mark.ray\n"
        code += "@pytest.mark.parametrize('n', range(4))\ndef test_on_ray(n):\n"
        (tmp_path / name).write_text(f"{code}    print(os.getpid(), file=open('processes', 'a'))\n")
    found = {}
    for tier in ("quick", "rest", "release"):
        status, output = run(TIERED, f"--tier={tier}", "--numprocesses=2", "--dist=loadfile", "-v")
        assert status == 0, output
        found[tier] = set(re.findall(r"PASSED test_(\w+\.py::\w+)", output))
    assert found["quick"] == {"a.py::test_on_ray", "b.py::test_on_ray", "it.py::test_unmarked"}
    assert found["rest"] == {"it.py::test_on_ray", "it.py::test_page"} and found["release"] == {"it.py::test_pages"}
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == 8 and len(set(processes)) == 1
    (tmp_path / "test_z.py").write_text("import pytest\n\n@pytest.mark.cluster\ndef test_nodes(): pass\n")
    _, output = run(TIERED, "--tier=rest", "--collect-only", "-q")
    assert re.findall(r"test_(\w+\.py::\w+)", output) == ["z.py::test_nodes", "it.py::test_on_ray", "it.py::test_page"]


def test_a_failure_fits_a_screen(run) -> None:
    code = """
        import sys

        TEXT = "\\n".join(f"line {number} of an error" for number in range(200))

        def dive(depth):
            if depth:
                dive(depth - 1)
            raise ValueError(TEXT)

        def test_of_a_chain():
            try:
                try:
                    dive(20)
                except ValueError as error:
                    raise KeyError(TEXT) from error
            except KeyError as error:
                raise RuntimeError(TEXT) from error

        def test_it():
            for number in range(200):
                print("said", number, file=sys.stderr)
            dive(20)
    """
    status, output = run(code, "--show-capture=stderr")
    chain, shown = output.split("= FAILURES =")[1].split("_ test_it _")
    assert status == 1 and len(chain.splitlines()) < 60 and len(shown.splitlines()) < 60, output
    for kept in (
        "line 0 of an error",
        "line 199 of an error",
        "said 0",
        "said 199",
        "frames in the middle",
        "E   ... ",
    ):
        assert kept in shown, kept


def test_what_is_shared_is_made_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    asked = []

    def make(folder: Path) -> None:
        asked.append(folder)
        (folder / f"made-{len(asked)}").touch()
        if len(asked) == 1:
            raise OSError("the first try fails")

    with pytest.raises(OSError, match="first try"):
        make_once(tmp_path_factory, "of-the-suite", make)
    folders = [make_once(tmp_path_factory, "of-the-suite", make) for _ in range(2)]
    assert folders[0] == folders[1] and len(asked) == 2
    assert [path.name for path in folders[0].glob("made-*")] == ["made-2"]


def test_text_is_cut_in_its_middle() -> None:
    assert cut("\n".join("abcdef"), 6) == "\n".join("abcdef")
    assert cut("\n".join("abcdefgh"), 6) == "a\nb\n... 2 lines ...\ne\nf\ng\nh"
    assert cut("x" * 1000, 3) == "x" * 240 + " ..."
