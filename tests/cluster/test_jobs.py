"""Talking to a job server that isn't there, isn't one, or is another one. A real one: tests/pipeline/jobs."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest
import ray

from cluster.jobs import JobServer, last_line
from cluster.packaging import list_package
from pipeline.demo.cluster import start_cluster


class Handler(BaseHTTPRequestHandler):
    """Answers by path; keeps what it gets."""

    server: Standin

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.sent.append((f"{self.command} {self.path}", sent))
        known = (answer for path, answer in self.server.answers.items() if fnmatch(self.path, path))
        status, body = next(known, (404, ""))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        time.sleep(self.server.slow_s)
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None: ...


class Standin(ThreadingHTTPServer):
    """A web server."""

    def __init__(self, answers: dict[str, tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.slow_s = answers, 0.0
        """Path -> status and body; seconds that an upload waits."""
        self.sent: list[tuple[str, bytes]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(answers: dict[str, tuple[int, str]]) -> Iterator[Standin]:
    with Standin(answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def version(number: str) -> tuple[int, str]:
    return 200, json.dumps({"version": "4", "ray_version": number, "ray_commit": "", "session_name": "s"})


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
        with serving({"*": (status, body)}) as server:
            assert f"what answers at {server.address} is no job server of Ray's" in refusal(server.address), (status, body)


def test_a_cluster_of_another_version() -> None:
    with serving({"/api/version": version("2.49.0")}) as server:
        words = refusal(server.address)
    assert words.startswith(
        f"--address: the cluster at {server.address} runs Ray 2.49.0, and this is prefray for Ray {ray.__version__}"
    )


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_given_address_counts_and_not_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with serving({}) as server, serving({"/api/version": version("2.49.0")}) as other:
        monkeypatch.setenv(name, other.address)
        assert f"what answers at {server.address} is no job server of Ray's" in refusal(server.address)
        assert os.environ[name] == other.address and other.sent == []


def test_a_job_brings_the_files_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: a limit to connect must not be one for the upload, as it is in `requests`."""
    monkeypatch.setattr("cluster.jobs.TIMEOUT", (0.5, 20))
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "data").write_bytes(os.urandom(16 << 20))
    job = {"submission_id": "one", "entrypoint": "true", "runtime_env": {"env_vars": {"A": "b"}}}
    answers = {
        "/api/version": version(ray.__version__),
        "/api/jobs/": (200, '{"job_id": "one", "submission_id": "one"}'),
    }
    with serving(answers) as server:
        client = JobServer(server.address)
        assert client.submit(job, None, print) == "one"
        bare = json.loads(server.sent[-1][1])["runtime_env"]
        assert bare["env_vars"] == {"A": "b"} and "working_dir" not in bare
        server.slow_s = 2.0
        server.sent.clear()
        with pytest.raises(
            ValueError, match=f"^the job server at {server.address} refuses the job: Request failed with status"
        ):
            client.submit(job, list_package(tmp_path), print)  # it takes no package
        ((what, archive),) = [(what, sent) for what, sent in server.sent if what.startswith("PUT /api/packages/gcs/_ray_pkg_")]
        assert ZipFile(io.BytesIO(archive)).namelist() == ["data", "recipe.yaml"]
        server.answers["/api/packages/*"] = (200, "")
        assert client.submit(job, list_package(tmp_path), print) == "one"
        assert json.loads(server.sent[-1][1])["runtime_env"]["working_dir"] == f"gcs://{what.rpartition('/')[2]}"
    assert "working_dir" not in job["runtime_env"]


def test_a_job_that_is_there() -> None:
    known = {"type": "SUBMISSION", "submission_id": "dpo-1", "status": "RUNNING", "entrypoint": "x"}
    answers = {
        "/api/version": version(ray.__version__),
        "/api/jobs/dpo-1": (200, json.dumps(known)),
        "/api/jobs/": (200, json.dumps([known, {**known, "type": "DRIVER", "submission_id": "dpo-2"}])),
    }
    with serving(answers) as server:
        client = JobServer(server.address)
        assert client.info("dpo-1").submission_id == "dpo-1" and [job.submission_id for job in client.list()] == ["dpo-1"]
        for name in ("dpo-2", "../dpo-1"):
            with pytest.raises(ValueError, match=f"has no job '{re.escape(name)}'; did you mean 'dpo-1'?"):
                client.info(name)
        with pytest.raises(ValueError, match="has no job 'x'; `prefray jobs list` shows those that it has"):
            client.info("x")
        with pytest.raises(ValueError, match=f"--id: {server.address} has a job 'dpo-1' already; give another name"):
            client.submit({"submission_id": "dpo-1"}, None, print)
        with pytest.raises(ValueError, match="--id: letters, digits, dashes, dots and underscores; got 'a b'"):
            client.submit({"submission_id": "a b"}, None, print)


def test_an_error_of_the_server_is_its_last_line() -> None:
    words = "Request failed with status code 500: Traceback (most recent call last):\n  File x\nValueError: no such thing."
    assert last_line(RuntimeError(words)) == "ValueError: no such thing"
    assert last_line(RuntimeError()) == "RuntimeError"


@pytest.mark.driver
def test_a_cluster_beside_another_on_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's agent, which starts the jobs, serves none where its port is taken, and says so nowhere."""
    monkeypatch.setattr("cluster.jobs.STARTING_S", 30)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    notes: list[str] = []
    with ExitStack() as stack:
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        taken = other.getsockname()[1]
        started = start_cluster(folder=folder, environment=environment, agent_port=taken)
        address = stack.enter_context(started).address
        with pytest.raises(ValueError, match=r"took no job within 30 s: .*--dashboard-agent-listen-port=0"):
            JobServer(address).submit({"submission_id": "one", "entrypoint": "true"}, None, notes.append)
    assert notes == ["waiting for the cluster's head node to take jobs"]
