"""A cluster's job server: submit, follow, list, stop. Talks HTTP, so that a laptop needs nothing but an address."""

from __future__ import annotations

import asyncio
import difflib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from cluster.addresses import token_hint

__all__ = ["JobRequest", "JobServer", "LostContact"]

FIRST_TIMEOUT = (4, 5)
"""Seconds to connect, and to wait for an answer, when it isn't known yet whether anything is there."""
TIMEOUT = (10, 120)
"""The same afterwards: a head that is busy, a package that is large."""
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray's client, each of which sets its own level."""
LOST_AFTER_S = 60
"""Without an answer for so long, following a job ends."""
DISCONNECTED = (OSError, RuntimeError, aiohttp.ClientError)
"""What Ray's client raises where the connection fails in the middle; those of requests are OSErrors."""


class LostContact(RuntimeError):
    """The job server doesn't answer any more; the job may go on."""


@dataclass(frozen=True)
class JobRequest:
    """What a job server is asked to run."""

    name: str
    """The submission's id."""
    entrypoint: str
    working_dir: Path | None
    excludes: tuple[str, ...] = ()
    py_modules: tuple[Path, ...] = ()
    env_vars: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    num_cpus: float | None = None
    num_gpus: float | None = None
    memory: int | None = None
    resources: dict[str, float] | None = None
    """What the entrypoint itself reserves; it runs on the head where it reserves nothing."""

    @property
    def runtime_env(self) -> dict[str, Any]:
        """As Ray takes it."""
        environment: dict[str, Any] = {}
        if self.working_dir is not None:
            environment = {"working_dir": str(self.working_dir), "excludes": list(self.excludes)}
        if self.py_modules:
            environment["py_modules"] = [str(module) for module in self.py_modules]
        if self.env_vars:
            environment["env_vars"] = self.env_vars
        return environment


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


class _Client(JobSubmissionClient):
    """Ray's client, which by itself waits for ever for a server that doesn't answer."""

    timeout: tuple[float, float] = FIRST_TIMEOUT

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": self.timeout, **options})


@contextmanager
def _without(name: str) -> Iterator[None]:
    """Hide a variable of the environment for a moment."""
    value = os.environ.pop(name, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[name] = value


class JobServer:
    """The job server at an address.

    Raises:
        ValueError: when none answers, when it wants another token, or when the cluster runs another version of Ray.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with _without("RAY_API_SERVER_ADDRESS"):  # Ray would prefer it to the address that is given
                self._client = _Client(address)
            version = self._client._do_request("GET", "/api/version").json()["ray_version"]
        except AuthenticationError:
            raise ValueError(f"--address: {address} refuses requests without the cluster's token; {token_hint()}") from None
        except (requests.exceptions.Timeout, ConnectionError, requests.exceptions.ConnectionError) as error:
            slow = isinstance(error, requests.exceptions.ReadTimeout)
            what = f"something at {address} takes connections and doesn't answer" if slow else f"nothing answers at {address}"
            raise ValueError(f"--address: {what}; {_where_to_look(address)}") from None
        except (RuntimeError, requests.exceptions.RequestException, KeyError) as error:
            raise ValueError(f"--address: what answers at {address} is no job server of Ray's ({_first_line(error)})") from None
        if version != ray.__version__:
            raise ValueError(
                f"--address: the cluster at {address} runs Ray {version}, and this is prefray for Ray {ray.__version__}; "
                "use a cluster of that version"
            )
        self._client.timeout = TIMEOUT

    def nodes(self) -> list[dict[str, float]]:
        """Total resources of each node that is alive."""
        answer = self._client._do_request("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"}).json()
        return [node["resources_total"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def has_autoscaler(self) -> bool:
        """Whether nodes may still come; also where the cluster doesn't say."""
        status = self._client._do_request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
        types = status.get("autoscalerReport", {}).get("nodeTypeMapping")
        # Without an autoscaler Ray reports a type of its own for every node.
        return not types or any(kind != f"node_{node}" for node, kind in types.items())

    def submit(self, request: JobRequest) -> str:
        """Upload what the job needs and start it; returns its id.

        Raises:
            ValueError: when there is a job of that name, or the job server refuses it.
        """
        if self._client._do_request("GET", f"/api/jobs/{request.name}").status_code == 200:
            raise ValueError(f"--id: {self.address} has a job {request.name!r} already; give another name")
        try:
            return self._client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.name,
                runtime_env=request.runtime_env,
                metadata=request.metadata,
                entrypoint_num_cpus=request.num_cpus,
                entrypoint_num_gpus=request.num_gpus,
                entrypoint_memory=request.memory,
                entrypoint_resources=request.resources,
            )
        except RuntimeError as error:
            raise ValueError(f"the job server at {self.address} refuses the job: {_first_line(error)}") from error

    def list(self) -> list[JobDetails]:
        """The submitted jobs, the newest first."""
        jobs = [job for job in self._client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: -(job.start_time or 0))

    def info(self, name: str) -> JobDetails:
        """How a job stands.

        Raises:
            ValueError: when there is no such job.
        """
        answer = self._client._do_request("GET", f"/api/jobs/{name}")
        if answer.status_code == 200:
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
                asyncio.run(self._tail(name, log))
                if (job := self.info(name)).status.is_terminal():
                    return job
                silent_since = None
            except DISCONNECTED as error:
                now = time.monotonic()
                if silent_since is None:
                    silent_since = now
                    note(f"lost contact with {self.address}; trying again")
                if now - silent_since > LOST_AFTER_S:
                    raise LostContact(f"{self.address} hasn't answered for {LOST_AFTER_S} s: {_first_line(error)}") from None
            time.sleep(1)

    async def _tail(self, name: str, log: _Log) -> None:
        log.seen = 0  # the server starts from the beginning each time
        async for piece in self._client.tail_job_logs(name):
            log.take(piece)

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

    @staticmethod
    def succeeded(job: JobDetails) -> bool:
        """Whether it ended well."""
        return job.status == JobStatus.SUCCEEDED


def _where_to_look(address: str) -> str:
    host = urlsplit(address).hostname
    if host in ("127.0.0.1", "localhost"):
        return "give --address, or bring the head's port 8265 here (ray dashboard, kubectl port-forward, ssh -L)"
    return "see that it is the dashboard's address (port 8265 by default) and that the dashboard listens beyond loopback"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
