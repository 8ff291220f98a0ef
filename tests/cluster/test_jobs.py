"""Talking to a job server that isn't there, isn't one, or is another one. A real one: tests/pipeline/jobs."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest
import ray
import requests

from cluster.job_client import last_line
from cluster.jobs import JobRequest, JobServer, LostContact, _Log
from cluster.packaging import list_package


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A web server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def refusal(address: str) -> str:
    with pytest.raises(ValueError, match=r"^--address: ") as caught:
        JobServer(address)
    return str(caught.value)


def test_nothing_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert refusal(address).startswith(f"--address: nothing answers at {address}; give --address, or bring the head's port")
    assert "nothing answers at http://no-such-host.invalid:8265; see that it is" in refusal("http://no-such-host.invalid:8265")


def test_something_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert f"something at {address} takes connections and doesn't answer" in refusal(address)


def test_another_web_server() -> None:
    for status, body in ((404, ""), (200, "<html>"), (200, "{}"), (500, "")):
        with answering(status, body) as address:
            assert f"what answers at {address} is no job server of Ray's" in refusal(address), (status, body)


def test_a_cluster_of_another_version() -> None:
    body = json.dumps({"version": "4", "ray_version": "2.49.0", "ray_commit": "", "session_name": "s"})
    with answering(200, body) as address:
        words = refusal(address)
    assert words.startswith(
        f"--address: the cluster at {address} runs Ray 2.49.0, and this is prefray for Ray {ray.__version__}"
    )


def test_the_given_address_counts_and_not_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"version": "4", "ray_version": "2.49.0", "ray_commit": "", "session_name": "s"})
    with answering(404, "") as address, answering(200, body) as other:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other)
        assert f"what answers at {address} is no job server of Ray's" in refusal(address)


def test_a_log_that_comes_again_is_written_once() -> None:
    written: list[str] = []
    log = _Log(written.append)
    for pieces in (["ab", "cd"], ["a", "bcde"], ["abcdef"]):
        log.seen = 0
        for piece in pieces:
            log.take(piece)
    assert "".join(written) == "abcdef"


def test_the_runtime_environment_has_what_is_given(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    archive = tmp_path / "package.zip"
    bare = JobRequest("job", "python -m pipeline", None)
    assert bare.runtime_env(archive) == {"excludes": ["__pycache__"]} and not archive.exists()
    package = list_package(tmp_path)
    full = JobRequest("job", "x", package, (Path("/ours/pipeline"),), {"HF_TOKEN": "t"})
    assert full.runtime_env(archive) == {
        "working_dir": str(archive),
        "excludes": ["__pycache__"],
        "py_modules": ["/ours/pipeline"],
        "env_vars": {"HF_TOKEN": "t"},
    }
    assert ZipFile(archive).namelist() == ["recipe.yaml"]


def test_what_the_entrypoint_reserves() -> None:
    assert JobRequest("job", "x", None).reserved == {}
    asked = JobRequest("job", "x", None, num_cpus=1.0, memory=5, resources={"big": 1.0})
    assert asked.reserved == {"CPU": 1.0, "memory": 5, "big": 1.0}


def test_an_error_of_the_server_is_its_last_line() -> None:
    words = "Request failed with status code 500: Traceback (most recent call last):\n  File x\nValueError: no such thing."
    assert last_line(RuntimeError(words)) == "ValueError: no such thing"
    assert last_line(RuntimeError()) == "RuntimeError"


def test_a_head_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is silent, and doesn't end."""
    notes: list[str] = []
    for name, seconds in (("SILENCE_S", 0.1), ("LOST_AFTER_S", 0.5), ("SOON", (0.2, 0.2))):
        monkeypatch.setattr(f"cluster.jobs.{name}", seconds)

    class Silent:
        answers = 2

        def request(self, *_: object, **__: object) -> requests.Response:
            self.answers -= 1
            if self.answers < 0:
                raise requests.exceptions.ConnectTimeout
            answer = requests.Response()
            answer.status_code = 200
            answer._content = b'{"type": "SUBMISSION", "status": "RUNNING", "entrypoint": "x"}'
            return answer

        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            yield "step 1"
            await asyncio.sleep(3600)

    server = JobServer.__new__(JobServer)
    server.address, server._client = "http://head:8265", Silent()  # type: ignore[assignment]
    written: list[str] = []
    with pytest.raises(LostContact, match="http://head:8265 hasn't answered for 0.5 s"):
        server.follow("job", written.append, notes.append)
    assert notes == ["lost contact with http://head:8265; trying again"] and written == ["step 1"]
