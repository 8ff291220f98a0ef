"""Following a job from outside its cluster, and ending it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from cluster.addresses import DEFAULT
from cluster.jobs import LostContact
from pipeline.errors import JobEnded, RunFailed, UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from cluster.jobs import JobServer

__all__ = ["ending", "follow_job", "stop_job", "ways_to"]

PENDING_S = 15
STOP_SHOWN_S = 660
"""How long `prefray jobs stop` waits: what a job has to save a checkpoint, and a minute."""
SIGTERM_STATUS, SIGPIPE_STATUS = 143, 141


def follow_job(server: JobServer, name: str) -> None:
    """Print a job's log until it has ended.

    Raises:
        JobEnded: when it didn't end well, with the exit status of its driver.
        RunFailed: when the job server can't be reached any more.
        KeyboardInterrupt: on Ctrl-C, when it has been said that the job goes on.
    """
    try:
        job = server.follow(name, _write, _note)
    except LostContact as error:
        raise RunFailed(f"{error}; the job may go on: {ways_to(name, server)}") from error
    except KeyboardInterrupt:
        _note(f"\nthe job goes on: {ways_to(name, server)}")
        raise
    status = ending(job)
    if status:
        raise JobEnded(f"job {name} {_words(job)}", status)
    _note(f"job {name} succeeded")


def stop_job(server: JobServer, name: str) -> str:
    """Stop a job; returns how it ended, in words.

    Raises:
        RunFailed: when it hasn't ended after all the time that it has.
    """
    before = server.info(name)
    if before.status.is_terminal():
        return f"job {name} had ended already: it {_words(before)}"
    if before.status.value == "PENDING":
        job = server.stop(name, PENDING_S)
        if not job.status.is_terminal():
            return f"job {name} hasn't started, and Ray ends it once it would: it waits for {before.message or 'the cluster'}"
        return f"job {name} {_words(job)}"
    _note(f"stopping {name}: a run saves a checkpoint first, which may take minutes")
    job = server.stop(name, STOP_SHOWN_S)
    if not job.status.is_terminal():
        raise RunFailed(f"job {name} hasn't ended after {STOP_SHOWN_S} s; `prefray jobs status {name}` shows how it stands")
    return f"job {name} {_words(job)}"


def ending(job: JobDetails) -> int:
    """Exit status of a job that has ended: 0, its driver's own, 143 where it was stopped, else 1."""
    from ray.job_submission import JobStatus

    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.status == JobStatus.STOPPED:
        return SIGTERM_STATUS
    return job.driver_exit_code or 1


def ways_to(name: str, server: JobServer) -> str:
    """How to go on with a job."""
    where = "" if server.address == DEFAULT else f" --address {server.address}"
    return f"`prefray jobs logs {name} --follow{where}`, `prefray jobs stop {name}{where}`"


def _words(job: JobDetails) -> str:
    from ray.job_submission import JobStatus

    if job.status in (JobStatus.SUCCEEDED, JobStatus.STOPPED):
        return "succeeded" if job.status == JobStatus.SUCCEEDED else "was stopped"
    if job.driver_exit_code:
        return f"failed with status {job.driver_exit_code}"
    lines = (job.message or "").strip().splitlines()
    return f"failed: {lines[-1] if lines else 'Ray gives no reason'}"


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(SIGPIPE_STATUS) from None
    except OSError as error:
        raise UserError(f"the log can't be written: {error.strerror}; the job goes on") from error


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
