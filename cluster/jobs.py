"""A cluster's job server: submit, follow, list, stop. Talks HTTP, so that a laptop needs nothing but an address."""

from __future__ import annotations

import asyncio
import difflib
import re
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ray.job_submission import JobDetails, JobType

from cluster.job_client import connect, last_line
from cluster.job_request import JobRequest

__all__ = ["JobRequest", "JobServer", "LostContact"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SOON = (4, 15)
"""Seconds to connect, and to wait for an answer about a job."""
SILENCE_S = 10
"""Without a piece of the log for so long, the job server is asked whether it is there."""
STARTING_S = 60
"""How long a cluster may take from answering to taking jobs."""
NOT_YET = "No available agent"
LOST_AFTER_S = 60
"""Without an answer for so long, following a job ends."""
DISCONNECTED = (OSError, RuntimeError, aiohttp.ClientError)
"""What Ray's client raises where the connection fails in the middle; those of requests are OSErrors."""


class LostContact(RuntimeError):
    """The job server doesn't answer any more; the job may go on."""


@dataclass
class _Log:
    """Writes a text once that may come again from its beginning."""

    write: Callable[[str], None]
    written: int = 0
    seen: int = 0

    def take(self, piece: str) -> None:
        self.seen += len(piece)
        if (fresh := self.seen - self.written) > 0:
            self.write(piece[-fresh:])
            self.written = self.seen


def _run(tail: Coroutine[Any, Any, None]) -> None:
    """Run it to its end; in a notebook, whose thread has a loop already, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(tail)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(asyncio.run, tail).result()


class JobServer:
    """The job server at an address.

    Raises:
        ValueError: when none answers, when it wants another token, or when the cluster runs another version of Ray.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._client = connect(address)

    def nodes(self) -> list[dict[str, float]]:
        """Total resources of each node that is alive."""
        answer = self._client.request("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"}).json()
        return [node["resources_total"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def has_autoscaler(self) -> bool:
        """Whether nodes may still come; also where the cluster doesn't say."""
        status = self._client.request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
        types = status.get("autoscalerReport", {}).get("nodeTypeMapping")
        # Without an autoscaler Ray reports a type of its own for every node.
        return not types or any(kind != f"node_{node}" for node, kind in types.items())

    def submit(self, request: JobRequest) -> str:
        """Upload what the job needs and start it; returns its id.

        Raises:
            ValueError: when there is a job of that name, or the job server refuses it.
        """
        if not NAME.fullmatch(request.name):
            raise ValueError(f"--id: letters, digits, dashes, dots and underscores; got {request.name!r}")
        if self._client.request("GET", f"/api/jobs/{request.name}").status_code == 200:
            raise ValueError(f"--id: {self.address} has a job {request.name!r} already; give another name")
        try:
            with tempfile.TemporaryDirectory(prefix="prefray-") as folder:
                runtime_env = request.runtime_env(Path(folder) / "package.zip")
                return self._submit(
                    entrypoint=request.entrypoint,
                    submission_id=request.name,
                    runtime_env=runtime_env,
                    metadata=request.metadata,
                    entrypoint_num_cpus=request.num_cpus,
                    entrypoint_num_gpus=request.num_gpus,
                    entrypoint_memory=request.memory,
                    entrypoint_resources=request.resources,
                )
        except RuntimeError as error:
            raise ValueError(f"the job server at {self.address} refuses the job: {last_line(error)}") from error

    def _submit(self, **request: Any) -> str:
        """Submit; a cluster that was started a moment ago answers before it takes jobs."""
        deadline = time.monotonic() + STARTING_S
        while True:
            try:
                return self._client.submit_job(**request)
            except RuntimeError as error:
                if NOT_YET not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1)

    def list(self) -> list[JobDetails]:
        """The submitted jobs, the newest first."""
        jobs = [job for job in self._client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: -(job.start_time or 0))

    def info(self, name: str) -> JobDetails:
        """How a job stands.

        Raises:
            ValueError: when there is no such job.
        """
        answer = self._client.request("GET", f"/api/jobs/{name}", timeout=SOON) if NAME.fullmatch(name) else None
        if answer is not None and answer.status_code == 200:
            return JobDetails(**answer.json())
        known = [job.submission_id for job in self.list() if job.submission_id]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else "`prefray jobs list` shows those that it has"
        raise ValueError(f"the cluster at {self.address} has no job {name!r}; {advice}")

    def logs(self, name: str) -> str:
        """What a job's driver has printed so far."""
        self.info(name)
        return self._client.get_job_logs(name)

    def follow(self, name: str, write: Callable[[str], None], note: Callable[[str], None]) -> JobDetails:
        """Pass on what a job's driver prints until the job has ended; returns how it ended.

        Args:
            write: takes what was printed, in pieces.
            note: takes a line about the connection.

        Raises:
            ValueError: when there is no such job.
            LostContact: when the job server hasn't answered for a minute.
        """
        self.info(name)
        log, silent_since = _Log(write), None
        while True:
            try:
                _run(self._tail(name, log))
                if (job := self.info(name)).status.is_terminal():
                    return job
                silent_since = None
            except DISCONNECTED as error:
                now = time.monotonic()
                if silent_since is None:
                    silent_since = now
                    note(f"lost contact with {self.address}; trying again")
                if now - silent_since > LOST_AFTER_S:
                    raise LostContact(f"{self.address} hasn't answered for {LOST_AFTER_S} s: {last_line(error)}") from None
            time.sleep(1)

    async def _tail(self, name: str, log: _Log) -> None:
        """Pass pieces on until the log ends. A head that is lost says nothing: in silence the job is asked after."""
        log.seen = 0  # the server starts from the beginning each time
        pieces = self._client.tail_job_logs(name)
        while True:
            coming = asyncio.ensure_future(anext(pieces))
            while not (await asyncio.wait({coming}, timeout=SILENCE_S))[0]:
                try:
                    self._client.request("GET", f"/api/jobs/{name}", timeout=SOON)
                except DISCONNECTED:
                    coming.cancel()
                    raise
            try:
                log.take(coming.result())
            except StopAsyncIteration:
                return

    def stop(self, name: str, wait_s: float) -> JobDetails:
        """End a job, and wait until it has ended or `wait_s` have passed.

        Raises:
            ValueError: when there is no such job.
        """
        self.info(name)
        self._client.stop_job(name)
        deadline = time.monotonic() + wait_s
        while not (job := self.info(name)).status.is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
        return job
