"""A real cluster of several nodes on this machine: each node in a network namespace with an address of its own.

Namespaces need Linux, root and iproute2; elsewhere all nodes have this machine's address. The nodes' Python has every
dependency and not this project, as on a cluster that jobs are submitted to.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests

from tests.ports import unused_port

__all__ = ["Cluster", "Node", "cluster_of"]

START_WITHIN_S = 240
OBJECT_STORE = 100 << 20


@dataclass
class Node:
    """One raylet, and what it has started."""

    address: str
    namespace: str | None
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def pids(self) -> list[int]:
        """Everything that runs on the node."""
        if self.namespace is not None:
            return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]
        try:
            family = psutil.Process(self.process.pid)
            return [family.pid, *(child.pid for child in family.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """What a power cut does."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(timeout=30)


@dataclass
class Cluster:
    """Nodes, the first of which is the head and takes no work.

    All of them have this machine's files. Each has its own home and temporary folder; and each worker its own where Ray
    unpacks packages, and deletes those that the node itself doesn't need any more, and under `private`.
    """

    folder: Path
    python: Path
    token: str
    has_namespaces: bool
    number: int = field(default_factory=lambda: _free_number())
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port, self.job_server_port = (6379, 8265) if self.has_namespaces else (unused_port(), unused_port())

    @property
    def outside(self) -> str:
        """An address by which every node reaches this process."""
        return f"10.213.{self.number}.1" if self.has_namespaces else "127.0.0.1"

    @property
    def private(self) -> Path:
        """A folder that is another one on every worker, where nodes have namespaces."""
        return self.folder / "private"

    @property
    def job_server(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.nodes[0].address}:{self.job_server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of who talks to the job server."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start_head(self) -> None:
        """Start the cluster."""
        address = self._new_address()
        ports = [f"--port={self.port}", f"--dashboard-host={address}", f"--dashboard-port={self.job_server_port}"]
        beside = [] if self.has_namespaces else ["--dashboard-agent-listen-port=0"]
        self._start(address, ["--head", *ports, *beside, "--num-cpus=0"])
        self._wait_for(lambda: len(self._alive()) == 1)

    def add_node(self) -> Node:
        """Start a node with one CPU, and wait until the cluster knows it."""
        before = self._alive()
        self._start(self._new_address(), [f"--address={self.nodes[0].address}:{self.port}", "--num-cpus=1"])
        self._wait_for(lambda: len(self._alive() - before) > 0)
        return self.nodes[-1]

    def stop(self) -> None:
        """End every process, and take the network down."""
        for node in reversed(self.nodes):
            node.kill()
        if self.has_namespaces:
            for node in self.nodes:
                _ip("netns", "delete", str(node.namespace))
            _ip("link", "delete", self._bridge)

    @property
    def _bridge(self) -> str:
        return f"prefray{self.number}"

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def _new_address(self) -> str:
        return f"10.213.{self.number}.{len(self.nodes) + 2}" if self.has_namespaces else "127.0.0.1"

    def _alive(self) -> set[str]:
        """Ids of the nodes that the cluster knows."""
        answer = requests.get(f"{self.job_server}/api/v0/nodes", headers=self._headers, timeout=10).json()
        return {node["node_id"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}

    def _start(self, address: str, words: list[str]) -> None:
        namespace = self._add_namespace(address) if self.has_namespaces else None
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        if namespace:
            folders = ("home", "tmp", *(("private", "ray") if self.nodes else ()))
            own = " && ".join(f"mount -t tmpfs none {self.folder / name}" for name in folders)
            inside += ["sh", "-c", f'{own} && exec "$@"', "sh"]
        start = [str(self.python), "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}"]
        files = self.folder / ("ray" if self.has_namespaces else f"ray-{len(self.nodes)}")
        command = [
            *inside,
            *start,
            *words,
            f"--temp-dir={files}",
            f"--object-store-memory={OBJECT_STORE}",
            "--disable-usage-stats",
            "--block",
        ]
        node = Node(address, namespace, command, self.folder / f"node-{len(self.nodes)}.log")
        node.process = self._run(node)
        self.nodes.append(node)

    def _run(self, node: Node) -> subprocess.Popen[bytes]:
        drop = ("PYTHONPATH", "RAY_ADDRESS", "VIRTUAL_ENV", "GLOO_SOCKET_IFNAME", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        environment = {name: value for name, value in os.environ.items() if name not in drop} | self.environment
        environment |= {"PATH": f"{self.python.parent}:{os.environ['PATH']}", "HOME": str(self.folder / "home")}
        environment["TMPDIR"] = str(self.folder / "tmp")
        with node.log.open("wb") as log:
            options: dict[str, Any] = {"env": environment, "stdout": log, "stderr": log, "cwd": self.folder}
            return subprocess.Popen(node.command, start_new_session=True, **options)

    def _add_namespace(self, address: str) -> str:
        name = f"{self._bridge}n{len(self.nodes)}"
        near, far = f"pf{self.number}n{len(self.nodes)}", f"pf{self.number}p{len(self.nodes)}"
        if not self.nodes:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{self.outside}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        _ip("netns", "add", name)
        _ip("link", "add", near, "type", "veth", "peer", "name", far)
        _ip("link", "set", far, "netns", name, "name", "eth0")
        _ip("link", "set", near, "master", self._bridge, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def _wait_for(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_WITHIN_S
        while time.monotonic() < deadline:
            if self.nodes[-1].process.poll() is not None:
                assert "timed out during startup" in self._last_words(), self._last_words()  # Ray's own limit of 30 s
                self.nodes[-1].process = self._run(self.nodes[-1])
            try:
                if is_true():
                    return
            except requests.RequestException:
                pass
            time.sleep(0.3)
        raise AssertionError(f"the node didn't start: {self._last_words()}")

    def _last_words(self) -> str:
        return self.nodes[-1].log.read_text()[-2000:]


def _free_number() -> int:
    """One whose network isn't there: a cluster that was killed leaves its own."""
    start = os.getpid()
    numbers = ((start + offset) % 250 for offset in range(250))
    return next(number for number in numbers if not Path(f"/sys/class/net/prefray{number}").exists())


@contextmanager
def cluster_of(workers: int) -> Iterator[Cluster]:
    """A head and so many workers of one CPU each."""
    with tempfile.TemporaryDirectory(prefix="nodes-", ignore_cleanup_errors=True) as name:  # Ray's sockets need a short path
        folder = Path(name)
        for part in ("home", "tmp", "private"):
            (folder / part).mkdir()
        cluster = Cluster(folder, _python_without_project(folder / "python"), secrets.token_hex(16), _has_namespaces())
        try:
            cluster.start_head()
            for _ in range(workers):
                cluster.add_node()
            yield cluster
        finally:
            cluster.stop()


def _python_without_project(folder: Path) -> Path:
    """A Python that has what this one has installed, but for projects that are installed as links to their sources."""
    venv.create(folder, symlinks=True)
    inside = next((folder / "lib").glob("python*")) / "site-packages"
    (inside / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def _has_namespaces() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"prefray-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return False
    _ip("netns", "delete", probe)
    return True


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
