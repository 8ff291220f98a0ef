"""Every command, recipe and program that the pages show is run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import requests

from pipeline import train
from pipeline.config import parse_config
from tests.docs.blocks import PAGES, ROOT, blocks_of
from tests.docs.reader import DEFAULT_RECIPE, ENDS_WITHIN_S, Reader
from tests.tiny import pairs

RUN = ("bash", "python", "yaml")
OTHER_NAMES = {"sh": "bash", "shell": "bash", "console": "bash", "zsh": "bash", "py": "python", "yml": "yaml"}
MOST_NOT_RUN = 15


@pytest.fixture(scope="module")
def job_server() -> Iterator[Callable[[], str]]:
    """Starts a cluster of one node when its address is first asked for."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        started: list[subprocess.Popen[bytes]] = []

        @cache
        def start() -> str:
            with socket.socket() as one, socket.socket() as other:
                one.bind(("127.0.0.1", 0))
                other.bind(("127.0.0.1", 0))
                port, dashboard = one.getsockname()[1], other.getsockname()[1]
            words = ["--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--dashboard-port={dashboard}"]
            words += ["--num-cpus=2", f"--temp-dir={folder}", "--object-store-memory=100000000"]
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *words, "--disable-usage-stats", "--block"]
            environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
            environment |= {"HOME": folder, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            with (Path(folder) / "log").open("wb") as log:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder))
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for(address, started[0], Path(folder) / "log")
            return address

        yield start
        for process in started:
            process.terminate()
            process.wait(timeout=60)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it takes a job: it answers earlier, and refuses them."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.post(f"{address}/api/jobs/", json={"entrypoint": "true"}, timeout=30).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.3)
    raise AssertionError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def finished_run(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Trains a small adapter when it is first asked for."""

    @cache
    def make() -> Path:
        folder = tmp_path_factory.mktemp("finished")
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(16)))
        keys = {"base_model": tiny_base, "datasets": [{"path": str(folder / "pairs.jsonl")}], "output_dir": str(folder / "run")}
        keys["dataset_prepared_path"] = str(folder / "prepared")
        return Path(train(parse_config({**DEFAULT_RECIPE, **keys})).run_dir)

    return make


def test_every_block_says_what_it_is() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            other = OTHER_NAMES.get(block.language)
            assert other is None, f"{block.place}: write ```{other}, not ```{block.language}, so that it is run"


def test_few_blocks_are_only_shown() -> None:
    shown = [block.place for page in PAGES for block in blocks_of(page) if block.language in RUN and block.not_run]
    assert len(shown) <= MOST_NOT_RUN, shown


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_works(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished_run: Callable[[], Path],
    job_server: Callable[[], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    reader = Reader(tmp_path, finished_run, job_server)
    for block in blocks_of(page):
        if block.language in RUN and not block.not_run:
            reader.follow(block)
