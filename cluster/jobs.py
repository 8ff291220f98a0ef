"""A cluster's job server: Ray's client of it, with messages that say what to do. It needs nothing but an address."""

from __future__ import annotations

import difflib
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobType

from cluster.addresses import token_hint
from cluster.packaging import Package
from cluster.ray_compat import job_client

__all__ = ["JobServer", "last_line"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FIRST_TIMEOUT = (4, 5)
"""Seconds to connect, and to wait for an answer, before the server has answered once."""
TIMEOUT = (10, 120)
"""The same afterwards: the head may be busy, a log long."""
SOON = (4, 15)
"""The same for a question about one job."""
NOTED_AFTER_S = 10
"""Seconds of waiting without a note."""
STARTING_S = 180
"""Seconds that a cluster may take from its first answer to accepting jobs."""
NOT_YET = "No available agent"
WITHOUT_AGENT = (
    "the agent of its head node serves none, as happens where another Ray of that machine has its port (52365); "
    "start the cluster with --dashboard-agent-listen-port=0, or stop the other Ray"
)


class JobServer:
    """The job server at an address; its `client` is Ray's.

    Raises:
        ValueError: when none answers, when it wants another token, or when the cluster runs another version of Ray.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self.client = job_client(address, FIRST_TIMEOUT)
            version = self.client.request("GET", "/api/version").json()["ray_version"]
        except AuthenticationError:
            raise ValueError(f"--address: {address} refuses requests without the cluster's token; {token_hint()}") from None
        except (requests.exceptions.Timeout, ConnectionError, requests.exceptions.ConnectionError) as error:
            what = f"nothing answers at {address}"
            if isinstance(error, requests.exceptions.ReadTimeout):
                what = f"something at {address} takes connections and doesn't answer"
            raise ValueError(f"--address: {what}; {_where_to_look(address)}") from None
        except (RuntimeError, requests.exceptions.RequestException, KeyError) as error:
            raise ValueError(f"--address: what answers at {address} is no job server of Ray's ({last_line(error)})") from None
        if version != ray.__version__:
            raise ValueError(
                f"--address: the cluster at {address} runs Ray {version}, and this is prefray for Ray {ray.__version__}; "
                "use a cluster of that version"
            )
        # Not before: an address where nothing answers is a mistake to report within seconds.
        self.client.timeout = TIMEOUT

    def nodes(self) -> list[dict[str, float]]:
        """Return the total resources of each node that is alive."""
        answer = self.client.request("GET", "/api/v0/nodes", params={"detail": "1", "limit": "10000"}).json()
        return [node["resources_total"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def has_autoscaler(self) -> bool:
        """Return whether nodes may still join; True where the cluster doesn't report it."""
        status = self.client.request("GET", "/api/cluster_status").json()["data"].get("clusterStatus") or {}
        types = status.get("autoscalerReport", {}).get("nodeTypeMapping")
        # Without an autoscaler Ray reports a type of its own for every node.
        return not types or any(kind != f"node_{node}" for node, kind in types.items())

    def submit(self, job: dict[str, Any], package: Package | None, note: Callable[[str], None]) -> str:
        """Upload what the job needs and start it; returns its id.

        Args:
            job: arguments of Ray's `submit_job`.
            package: files of its working directory; None for a job that uploads modules only.
            note: called with a message when the cluster isn't ready to accept jobs.

        Raises:
            ValueError: when there is a job of that name, or the job server refuses it.
        """
        name = job["submission_id"]
        if not NAME.fullmatch(name):
            raise ValueError(f"--id: letters, digits, dashes, dots and underscores; got {name!r}")
        # Ray would refuse it too, but only after the upload.
        if self.client.request("GET", f"/api/jobs/{name}").status_code == 200:
            raise ValueError(f"--id: {self.address} has a job {name!r} already; give another name")
        with tempfile.TemporaryDirectory(prefix="prefray-") as folder:
            if package is not None:
                archive = Path(folder) / "package.zip"
                package.write(archive)
                job = {**job, "runtime_env": {**job["runtime_env"], "working_dir": str(archive)}}
            return self._submit(job, note)

    def _submit(self, job: dict[str, Any], note: Callable[[str], None]) -> str:
        """Submit, with retries: a cluster answers before it accepts jobs."""
        start, has_noted = time.monotonic(), False
        while True:
            try:
                return self.client.submit_job(**job)
            except RuntimeError as error:
                waited = time.monotonic() - start
                # Ray's client has only RuntimeError for all refusals.
                if NOT_YET not in str(error):
                    raise ValueError(f"the job server at {self.address} refuses the job: {last_line(error)}") from error
                if waited > STARTING_S:
                    message = f"the cluster at {self.address} took no job within {STARTING_S:.0f} s: {WITHOUT_AGENT}"
                    raise ValueError(message) from None
            if not has_noted and waited > NOTED_AFTER_S:
                note("waiting for the cluster's head node to take jobs")
                has_noted = True
            time.sleep(1)

    def list(self) -> list[JobDetails]:
        """Return the submitted jobs, newest first."""
        # Ray also lists drivers that weren't submitted: they have no id and no log.
        jobs = [job for job in self.client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: -(job.start_time or 0))

    def info(self, name: str) -> JobDetails:
        """Return the state of a job.

        Raises:
            ValueError: when there is no such job.
        """
        # A name with other characters, such as a slash, would be another endpoint.
        answer = self.client.request("GET", f"/api/jobs/{name}", timeout=SOON) if NAME.fullmatch(name) else None
        if answer is not None and answer.status_code == 200:
            return JobDetails(**answer.json())
        existing = [job.submission_id for job in self.list() if job.submission_id]
        near = difflib.get_close_matches(name, existing, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]!r}?" if near else "`prefray jobs list` shows those that it has"
        raise ValueError(f"the cluster at {self.address} has no job {name!r}; {advice}")

    def logs(self, name: str) -> str:
        """Return the output of a job's driver so far."""
        self.info(name)
        return self.client.get_job_logs(name)


def _where_to_look(address: str) -> str:
    host = urlsplit(address).hostname
    if host in ("127.0.0.1", "localhost"):
        return "give --address, or bring the head's port 8265 here (ray dashboard, kubectl port-forward, ssh -L)"
    return "see that it is the dashboard's address (port 8265 by default) and that the dashboard listens beyond loopback"


def last_line(error: BaseException) -> str:
    """Return the last line of an error: Ray's messages end with the reason, after the server's traceback."""
    lines = [line for line in str(error).strip().rstrip(".").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else type(error).__name__
