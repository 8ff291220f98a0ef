"""Talking to a job server that isn't there, isn't one, or is another one. A real one: tests/pipeline/jobs."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from cluster.jobs import JobRequest, JobServer, _Log


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
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^--address: ") as caught:
        JobServer(address)
    assert time.monotonic() - start < 10
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
    with answering(404, "") as address, answering(500, "") as other:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other)
        assert f"what answers at {address} is" in refusal(address)


def test_a_log_that_comes_again_is_written_once() -> None:
    written: list[str] = []
    log = _Log(written.append)
    for pieces in (["ab", "cd"], ["a", "bcde"], ["abcdef"]):
        log.seen = 0
        for piece in pieces:
            log.take(piece)
    assert "".join(written) == "abcdef"


def test_the_runtime_environment_has_what_is_given() -> None:
    bare = JobRequest("job", "python -m pipeline", Path("/work"))
    assert bare.runtime_env == {"working_dir": "/work", "excludes": []}
    full = JobRequest("job", "x", Path("/work"), (".env",), (Path("/ours/pipeline"),), {"HF_TOKEN": "t"})
    assert full.runtime_env == {
        "working_dir": "/work",
        "excludes": [".env"],
        "py_modules": ["/ours/pipeline"],
        "env_vars": {"HF_TOKEN": "t"},
    }
