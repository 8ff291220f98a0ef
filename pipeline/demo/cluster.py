"""A cluster of one node on this machine, for those who have none at hand: Ray with a job server, beside any other Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cluster.addresses import why_unreachable

__all__ = ["DemoCluster", "start_cluster"]

STARTS_WITHIN_S = 120


@dataclass(frozen=True)
class DemoCluster:
    """A running cluster; as a context it stops at the end."""

    address: str
    """Of its job server, http://HOST:PORT."""
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End its processes."""
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> DemoCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()


def start_cluster(
    num_cpus: int = 2, folder: str | Path | None = None, environment: Mapping[str, str] | None = None, agent_port: int = 0
) -> DemoCluster:
    """Start a cluster of one node on this machine, and wait for its job server.

    Args:
        folder: for Ray's files; a temporary one when None.
        environment: of the node; this process's when None.
        agent_port: where its agent, which starts the jobs, listens; 0 takes a free port.

    Raises:
        RuntimeError: when it doesn't start.
    """
    port, dashboard = _free_ports(2)
    words = [f"--num-cpus={num_cpus}", f"--port={port}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
    words += [f"--dashboard-agent-listen-port={agent_port}", "--disable-usage-stats", "--block"]
    words += [f"--temp-dir={folder or tempfile.mkdtemp(prefix='ray-')}"]
    given = dict(os.environ if environment is None else environment)
    # A job's `python` is this one.
    given["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), given.get("PATH", os.defpath)])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", *words]
    process = subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    cluster, deadline = DemoCluster(f"http://127.0.0.1:{dashboard}", process), time.monotonic() + STARTS_WITHIN_S
    while (why := why_unreachable(f"127.0.0.1:{dashboard}")) is not None:
        if process.poll() is not None or time.monotonic() > deadline:
            cluster.stop()
            raise RuntimeError(f"Ray didn't start on this machine: {why}")
        time.sleep(0.3)
    return cluster


def _free_ports(count: int) -> list[int]:
    # All are open at once, so that no two are the same.
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
