"""How a followed job ends. Real jobs: test_on_a_cluster.py."""

from __future__ import annotations

import io
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType
from rich.console import Console

from cluster.jobs import LostContact
from pipeline.errors import JobEnded, RunFailed, UserError
from pipeline.jobs.following import ending, follow_job, ways_to
from pipeline.jobs.tables import print_job, print_jobs


def job(status: JobStatus, code: int | None = None, **more: Any) -> JobDetails:
    known = {"type": JobType.SUBMISSION, "submission_id": "job-1", "entrypoint": "python x.py --url https://me:pw@host"}
    return JobDetails(**{**known, "status": status, "driver_exit_code": code, **more})


class Server:
    """A job server whose job ends, or whose connection does."""

    address = "http://head:8265"

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def follow(self, name: str, write: Any, note: Any) -> JobDetails:
        write("step 1\n")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def test_the_status_is_that_of_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(job(JobStatus.SUCCEEDED, 0)) == 0
    assert ending(job(JobStatus.FAILED, 2)) == 2
    assert ending(job(JobStatus.FAILED)) == 1
    assert ending(job(JobStatus.STOPPED)) == 143
    follow_job(Server(job(JobStatus.SUCCEEDED, 0)), "job-1")  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out == "step 1\n" and captured.err == "job job-1 succeeded\n"
    for outcome, status, words in (
        (job(JobStatus.FAILED, 2), 2, "job job-1 failed with status 2"),
        (job(JobStatus.FAILED, None, message="first\nno space left"), 1, "job job-1 failed: no space left"),
        (job(JobStatus.STOPPED), 143, "job job-1 was stopped"),
    ):
        with pytest.raises(JobEnded) as caught:
            follow_job(Server(outcome), "job-1")  # type: ignore[arg-type]
        assert (caught.value.status, str(caught.value)) == (status, words)


def test_the_job_goes_on_without_its_follower(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        follow_job(Server(KeyboardInterrupt()), "job-1")  # type: ignore[arg-type]
    assert "the job goes on: `prefray jobs logs job-1 --follow --address http://head:8265`" in capsys.readouterr().err
    with pytest.raises(RunFailed, match="hasn't answered for 60 s; the job may go on: `prefray jobs logs job-1"):
        follow_job(Server(LostContact("http://head:8265 hasn't answered for 60 s")), "job-1")  # type: ignore[arg-type]


class Reader:
    """Where the log goes, and nobody reads any more."""

    def __init__(self, error: OSError) -> None:
        self.error = error

    def write(self, _: str) -> None:
        raise self.error


def test_a_log_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.jobs.following.sys.stdout", Reader(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="the log can't be written: No space left on device; the job goes on"):
        follow_job(Server(job(JobStatus.SUCCEEDED, 0)), "job-1")  # type: ignore[arg-type]


def test_this_machines_own_job_server_needs_no_address() -> None:
    here = Server(None)
    here.address = "http://127.0.0.1:8265"
    assert ways_to("j", here) == "`prefray jobs logs j --follow`, `prefray jobs stop j`"  # type: ignore[arg-type]


def test_a_table_of_jobs() -> None:
    text = io.StringIO()
    facts = {"command": "tune", "recipe": "r[/x].yaml", "git_revision": "abc+changes"}
    started = {"start_time": 1_700_000_000_000, "end_time": 1_700_000_090_000}
    print_jobs([job(JobStatus.RUNNING), job(JobStatus.SUCCEEDED, 0, metadata=facts, **started)], "http://a", Console(file=text))
    first, second = [line for line in text.getvalue().splitlines() if "job-1" in line]
    assert "running" in first and "https://***@host" in first
    assert all(word in second for word in ("succeeded", "tune", "r[/x].yaml", "abc+changes", "0:01:30"))
    text = io.StringIO()
    print_jobs([], "http://a", Console(file=text))
    assert text.getvalue() == "no jobs at http://a\n"


def test_of_a_jobs_environment_only_names_are_shown() -> None:
    text = io.StringIO()
    runtime_env = {"env_vars": {"HF_TOKEN": "secret", "A": "b"}, "working_dir": "gcs://x"}
    known = {"runtime_env": runtime_env, "message": "log\nit failed", "metadata": {"status": "succeeded"}}
    print_job(job(JobStatus.FAILED, 2, **known), Console(file=text))
    shown = text.getvalue()
    assert "A, HF_TOKEN" in shown and "secret" not in shown and "pw@" not in shown
    assert shown.index("failed") < shown.index("succeeded") and "log" not in shown
    assert "exit status  2" in " ".join(shown.split("\n")) and "it failed" in shown
