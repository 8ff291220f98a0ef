"""A job on a cluster, which can be followed and stopped from outside of it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import aiohttp
from ray.job_submission import JobDetails, JobStatus

from cluster.addresses import DEFAULT, job_server
from cluster.jobs import JobServer, last_line
from pipeline.errors import JobEnded, RunFailed, UserError
from pipeline.jobs.tables import job_lines
from pipeline.ui.console import Printable

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Job"]

SILENCE_S = 10
"""Seconds without new log text after which the job server is asked."""
LOST_AFTER_S = 60
"""Seconds without an answer after which following a job ends."""
PENDING_S = 15
STOP_SHOWN_S = 660
"""Seconds that `prefray jobs stop` waits: those in which a job may save a checkpoint, and a minute."""
SIGTERM_STATUS, SIGPIPE_STATUS = 143, 141
DISCONNECTED = (OSError, RuntimeError, aiohttp.ClientError)
"""Errors of Ray's client when the connection breaks; those of `requests` are OSErrors."""


class Job(Printable):
    """A job on a cluster.

    Args:
        name: its id.
        address: of the cluster's dashboard, http://HEAD:8265; found as by `prefray jobs` when None.

    Raises:
        ValueError: when no job server answers there, or it has no such job.
    """

    def __init__(self, name: str, address: str | None = None) -> None:
        self.name = name
        self._server = JobServer(job_server(address))
        self.details()

    def details(self) -> JobDetails:
        """Return Ray's description of the job."""
        return self._server.info(self.name)

    @property
    def status(self) -> str:
        """`pending`, `running`, `succeeded`, `failed` or `stopped`."""
        return self.details().status.value.lower()

    @property
    def output_dir(self) -> str:
        """Output folder of its run, as a path or URI on the nodes; empty for a job without a recipe."""
        return (self.details().metadata or {}).get("output_dir", "")

    @property
    def ways_to(self) -> str:
        """The commands that follow or stop it."""
        option = "" if self._server.address == DEFAULT else f" --address {self._server.address}"
        return f"`prefray jobs logs {self.name} --follow{option}`, `prefray jobs stop {self.name}{option}`"

    def logs(self) -> str:
        """Return the output of its driver so far."""
        self.details()
        return self._server.client.get_job_logs(self.name)

    def follow(self) -> None:
        """Print its log until it has ended.

        Raises:
            JobEnded: when it failed or was stopped, with the exit status of its driver.
            RunFailed: when the job server can't be reached any more.
            KeyboardInterrupt: on Ctrl-C, after a note that the job keeps running.
        """
        try:
            status, words = _ending(self._follow())
        except KeyboardInterrupt:
            _note(f"\nthe job goes on: {self.ways_to}")
            raise
        if status:
            raise JobEnded(f"job {self.name} {words}", status)
        _note(f"job {self.name} {words}")

    def _follow(self) -> JobDetails:
        """Print the log to its end, with new connections for lost ones; return the job's final state."""
        self.details()
        log, address = _Log(self._server, self.name), self._server.address
        while True:
            try:
                _run(log.print())
                # A log also ends with a connection that was closed, so its end doesn't mean that of the job.
                if (job := self.details()).status.is_terminal():
                    return job
            except DISCONNECTED as error:
                now = time.monotonic()
                if log.lost_since is None:
                    log.lost_since = now
                    _note(f"lost contact with {address}; trying again")
                if now - log.lost_since > LOST_AFTER_S:
                    silence = f"{address} hasn't answered for {LOST_AFTER_S} s: {last_line(error)}"
                    raise RunFailed(f"{silence}; the job may go on: {self.ways_to}") from error
            time.sleep(1)

    def stop(self) -> str:
        """Stop it; a run saves a checkpoint first. Return a sentence about how it ended.

        Raises:
            RunFailed: when it hasn't ended after eleven minutes.
        """
        name, before = self.name, self.details()
        if before.status.is_terminal():
            return f"job {name} had ended already: it {_ending(before)[1]}"
        # A pending job has no process to stop, and Ray reports its end only once it would start.
        is_pending = before.status == JobStatus.PENDING
        if not is_pending:
            _note(f"stopping {name}: a run saves a checkpoint first, which may take minutes")
        self._server.client.stop_job(name)
        deadline = time.monotonic() + (PENDING_S if is_pending else STOP_SHOWN_S)
        while not (job := self.details()).status.is_terminal():
            if time.monotonic() > deadline:
                if is_pending:
                    awaited = before.message or "the cluster"
                    return f"job {name} hasn't started, and Ray ends it once it would: it waits for {awaited}"
                command = f"prefray jobs status {name}"
                raise RunFailed(f"job {name} hasn't ended after {STOP_SHOWN_S} s; `{command}` shows how it stands")
            time.sleep(0.5)
        return f"job {name} {_ending(job)[1]}"

    def __rich__(self) -> Text:
        return job_lines(self.details())


class _Log:
    """The output of a job's driver, printed once, although every connection replays it from the beginning."""

    def __init__(self, server: JobServer, name: str) -> None:
        self._server, self._name, self._printed = server, name, 0
        self.lost_since: float | None = None
        """Time of the first failure since the server's last answer."""

    async def print(self) -> None:
        """Print what comes until it ends. A lost head closes no connection, so the job server is asked while nothing comes."""
        known = self._printed
        pieces = self._server.client.tail_job_logs(self._name)
        with suppress(StopAsyncIteration):
            while True:
                # `asyncio.wait`, unlike `wait_for`, cancels nothing at its timeout: the connection stays.
                coming = asyncio.ensure_future(anext(pieces))
                while not (await asyncio.wait({coming}, timeout=SILENCE_S))[0]:
                    self._server.info(self._name)
                    self.lost_since = None
                piece = coming.result()
                if new := piece[known:]:
                    _write(new)
                    self._printed += len(new)
                    self.lost_since = None
                known = max(0, known - len(piece))


def _run(printing: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine; in a notebook, whose thread already runs an event loop, in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(printing)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(asyncio.run, printing).result()


def _ending(job: JobDetails) -> tuple[int, str]:
    """Return how a job has ended: the exit status of a follower, which is its driver's if it has one, and words."""
    if job.status == JobStatus.SUCCEEDED:
        return 0, "succeeded"
    if job.status == JobStatus.STOPPED:
        return SIGTERM_STATUS, "was stopped"
    if job.driver_exit_code:
        return job.driver_exit_code, f"failed with status {job.driver_exit_code}"
    lines = (job.message or "").strip().splitlines()
    return 1, f"failed: {lines[-1] if lines else 'Ray gives no reason'}"


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        # Python flushes stdout when it exits, which would fail again, with a message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(SIGPIPE_STATUS) from None
    except OSError as error:
        raise UserError(f"the log can't be written: {error.strerror}; the job goes on") from error


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
