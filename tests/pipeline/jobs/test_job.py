"""How a followed job ends. Real jobs: test_on_a_cluster.py; `tests/notebooks` submits and follows one from Python."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import requests
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from pipeline.errors import JobEnded, RunFailed, UserError
from pipeline.jobs.job import Job
from pipeline.jobs.tables import job_lines, jobs_table


def job(status: JobStatus, code: int | None = None, **more: Any) -> JobDetails:
    known = {"type": JobType.SUBMISSION, "submission_id": "job-1", "entrypoint": "python x.py --url https://me:pw@host"}
    return JobDetails(**{**known, "status": status, "driver_exit_code": code, **more})


class Server:
    """A job server whose job has this log, which is followed in parts: texts, seconds of silence, errors."""

    address = "http://head:8265"

    def __init__(self, outcome: JobDetails, *parts: list[Any]) -> None:
        self.outcome, self.parts = outcome, list(parts) or [["step 1\n"]]
        self.client, self.answers = self, True
        self.stopped: list[str] = []

    def info(self, _: str) -> JobDetails:
        if not self.answers:
            raise requests.exceptions.ConnectTimeout
        return self.outcome if not self.parts else job(JobStatus.RUNNING)

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        for part in self.parts.pop(0) if self.answers else [3600]:
            if isinstance(part, BaseException):
                raise part
            if isinstance(part, str):
                yield part
            else:
                await asyncio.sleep(part)


def job_of(server: Server) -> Job:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.jobs.job.JobServer", lambda _: server)
        return Job("job-1", server.address)


def follow(outcome: JobDetails, *parts: list[Any]) -> None:
    job_of(Server(outcome, *parts)).follow()


SUCCEEDED = job(JobStatus.SUCCEEDED, 0)


def test_nobody_answers() -> None:
    with pytest.raises(ValueError, match="127.0.0.1:9"):
        Job("dpo-1", "http://127.0.0.1:9")


def test_the_status_is_that_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    follow(SUCCEEDED)
    captured = capsys.readouterr()
    assert captured.out == "step 1\n" and captured.err == "job job-1 succeeded\n"
    for outcome, status, words in (
        (job(JobStatus.FAILED, 2), 2, "job job-1 failed with status 2"),
        (job(JobStatus.FAILED), 1, "job job-1 failed: Ray gives no reason"),
        (job(JobStatus.FAILED, None, message="first\nno space left"), 1, "job job-1 failed: no space left"),
        (job(JobStatus.STOPPED), 143, "job job-1 was stopped"),
    ):
        with pytest.raises(JobEnded) as caught:
            follow(outcome)
        assert (caught.value.status, str(caught.value)) == (status, words)


def test_the_job_goes_on_without_its_follower(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        follow(SUCCEEDED, ["step 1\n", KeyboardInterrupt()])
    assert "the job goes on: `prefray jobs logs job-1 --follow --address http://head:8265`" in capsys.readouterr().err


LOST = "lost contact with http://head:8265; trying again\n"


def test_every_connection_may_be_lost_and_the_log_is_printed_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts how long there was no answer, not since when the first connection was lost."""
    monkeypatch.setattr("pipeline.jobs.job.LOST_AFTER_S", 0.5)
    broken = RuntimeError("WebSocket connection closed")
    follow(SUCCEEDED, ["ab", "cd", broken], ["a", "bcde", 1, broken], ["abcdef", 1, aiohttp.ClientError()], ["abcdefg"])
    captured = capsys.readouterr()
    assert captured.out == "abcdefg" and captured.err == f"{LOST * 3}job job-1 succeeded\n"


def test_a_head_that_is_lost_is_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its log is silent, and doesn't end."""
    for name, seconds in (("SILENCE_S", 0.1), ("LOST_AFTER_S", 0.5)):
        monkeypatch.setattr(f"pipeline.jobs.job.{name}", seconds)
    server = Server(SUCCEEDED, *[["step 1", 3600]] * 9)
    asyncio.run(is_lost(server))
    assert capsys.readouterr() == ("step 1", LOST)


async def is_lost(server: Server) -> None:
    """As in a notebook, whose thread runs a loop."""
    asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(0.3), setattr(server, "answers", False)))
    with pytest.raises(
        RunFailed, match="http://head:8265 hasn't answered for 0.5 s: .*; the job may go on: `prefray jobs logs"
    ):
        job_of(server).follow()


class Reader:
    """Where the log goes, and nobody reads any more."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, _: str) -> None:
        raise self.error


def test_a_log_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.jobs.job.sys.stdout", Reader(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="the log can't be written: No space left on device; the job goes on"):
        follow(SUCCEEDED)


def test_this_machines_own_job_server_needs_no_address() -> None:
    here = Server(SUCCEEDED)
    here.address = "http://127.0.0.1:8265"
    assert job_of(here).ways_to == "`prefray jobs logs job-1 --follow`, `prefray jobs stop job-1`"


@pytest.mark.parametrize(
    ("states", "sentence", "is_asked"),
    [
        ([SUCCEEDED], "job job-1 had ended already: it succeeded", False),
        ([job(JobStatus.RUNNING), job(JobStatus.STOPPED)], "job job-1 was stopped", True),
        ([job(JobStatus.RUNNING), job(JobStatus.SUCCEEDED, 0)], "job job-1 succeeded", True),
        ([job(JobStatus.PENDING), job(JobStatus.STOPPED)], "job job-1 was stopped", True),
        (
            [job(JobStatus.PENDING, message="a node")] * 9,
            "job job-1 hasn't started, and Ray ends it once it would: it waits for a node",
            True,
        ),
    ],
)
def test_how_a_stopped_job_ends(
    monkeypatch: pytest.MonkeyPatch, states: list[JobDetails], sentence: str, is_asked: bool
) -> None:
    monkeypatch.setattr("pipeline.jobs.job.PENDING_S", 0.6)
    server = Stopping(states)
    assert job_of(server).stop() == sentence
    assert server.stopped == ["job-1"] * is_asked


class Stopping(Server):
    """A job server whose job has these states, one after another once it is to stop."""

    def __init__(self, states: list[JobDetails]) -> None:
        super().__init__(states[-1])
        self.states = states

    def info(self, _: str) -> JobDetails:
        return self.states.pop(0) if self.stopped and len(self.states) > 1 else self.states[0]

    def stop_job(self, name: str) -> None:
        self.stopped.append(name)
        self.states = self.states[1:] or self.states


def test_a_job_that_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.jobs.job.STOP_SHOWN_S", 0.2)
    with pytest.raises(RunFailed, match="job job-1 hasn't ended after 0.2 s; `prefray jobs status job-1` shows how it stands"):
        job_of(Stopping([job(JobStatus.RUNNING)] * 9)).stop()


def test_a_table_of_jobs() -> None:
    text = io.StringIO()
    facts = {"command": "tune", "recipe": "r[/x].yaml", "git_revision": "abc+changes"}
    started = {"start_time": 1_700_000_000_000, "end_time": 1_700_000_090_000}
    jobs = [job(JobStatus.RUNNING), job(JobStatus.SUCCEEDED, 0, metadata=facts, **started)]
    Console(file=text, width=160).print(jobs_table(jobs, "http://a"))
    first, second = [line for line in text.getvalue().splitlines() if "job-1" in line]
    assert "running" in first and "https://***@host" in first
    assert all(word in second for word in ("succeeded", "tune", "r[/x].yaml", "abc+changes", "0:01:30"))
    text = io.StringIO()
    Console(file=text).print(jobs_table([], "http://a"))
    assert text.getvalue() == "no jobs at http://a\n"


def test_of_a_jobs_environment_only_names_are_shown() -> None:
    text = io.StringIO()
    runtime_env = {"env_vars": {"HF_TOKEN": "secret", "A": "b"}, "working_dir": "gcs://x"}
    known = {"runtime_env": runtime_env, "message": "log\nit failed", "metadata": {"status": "succeeded"}}
    Console(file=text).print(job_lines(job(JobStatus.FAILED, 2, **known)))
    shown = text.getvalue()
    assert "A, HF_TOKEN" in shown and "secret" not in shown and "pw@" not in shown
    assert shown.index("failed") < shown.index("succeeded") and "log" not in shown
    assert "exit status  2" in " ".join(shown.split("\n")) and "it failed" in shown
