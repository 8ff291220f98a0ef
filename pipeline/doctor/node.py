"""Inspection of one node of a cluster, in a task on it; imports torch only where there are GPUs."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from cluster.config import RayConfig
from pipeline.doctor.machine import Gpus, Machine, find_gpus, machine_memory, shared_memory
from pipeline.doctor.reachability import reach
from pipeline.io.cache import NodeCache
from pipeline.io.remote_models import RemoteModel
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, is_uri, reason
from pipeline.ray.session import our_packages
from strategies.plugins import PluginError, Plugins

__all__ = ["CACHE", "TEMPORARY", "NodeFacts", "ProbeRequest", "Resource", "inspect_node", "list_probes", "remove_probes"]

PACKAGES = ("ray", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "datasets", "pyarrow", "numpy")
"""Packages that must have the same version on all nodes."""
PROBE = ".prefray-probe-"
TEMPORARY = "temporary files"
"""Key of `NodeFacts.disks`: the disk of the temporary folder, where checkpoints are staged on their way to storage."""
CACHE = "ray.cache_dir"
"""Key of the node's cache in `NodeFacts.disks` and `NodeFacts.unwritable`."""
ADDRESSES = (socket.AF_INET, socket.AF_INET6)

T = TypeVar("T")


@dataclass(frozen=True)
class Resource:
    """A model or data set that the recipe names."""

    key: str
    value: str
    kind: str
    """`model` or `data`."""
    remote: RemoteModel | None = None
    """The model at a URI, with the keys that workers will have."""

    def problem(self) -> str | None:
        """Return why this process can't reach it, or None."""
        return reach(self.value, self.kind) if self.remote is None else self.remote.problem()


@dataclass(frozen=True)
class ProbeRequest:
    """What to inspect on a node."""

    run: str
    """Id of this inspection, part of its files' names in storage."""
    folders: dict[str, Folder] = field(default_factory=dict)
    """Key of the recipe -> folder that the node must be able to write to."""
    resources: tuple[Resource, ...] = ()
    plugins: Plugins = field(default_factory=Plugins)
    ray: RayConfig | None = None
    """The recipe's keys of the node's cache; without a recipe it isn't inspected."""


@dataclass(frozen=True)
class NodeFacts:
    """Results of inspecting a node."""

    name: str
    """Name in messages."""
    address: str
    """Its address in the cluster."""
    hostname: str
    python: str
    versions: dict[str, str | None]
    code: str
    """Hash of prefray's own files there."""
    memory: Machine
    gpus: Gpus
    """What torch finds; not inspected where Ray counts no GPUs."""
    interfaces: dict[str, tuple[str, ...]]
    """Network interface -> its addresses."""
    gloo_interface: str | None
    """Value of GLOO_SOCKET_IFNAME."""
    shared_memory: tuple[int, int] | None
    """Bytes of /dev/shm: total, and free."""
    disks: dict[str, int]
    """Use of a disk (key of the recipe, or other) -> free bytes."""
    unwritable: dict[str, str]
    """Key of a folder -> why it can't be written."""
    unreachable: dict[str, str]
    """Key of a model or of data -> why it can't be reached."""
    plugins: str | None = None
    """Why the recipe's plugins can't be loaded; None where they can."""


def inspect_node(probe: ProbeRequest, name: str, address: str, gpus: float) -> NodeFacts:
    """Inspect this node, and write a probe file to every folder of the request.

    Args:
        name: of the node, in messages.
        address: of the node, in the cluster.
        gpus: number of GPUs that Ray counts here.
    """
    import psutil

    interfaces = {
        # IPv6 addresses carry their zone (fe80::1%eth0), and the cluster's don't.
        interface: tuple(entry.address.partition("%")[0] for entry in entries if entry.family in ADDRESSES)
        for interface, entries in psutil.net_if_addrs().items()
    }
    return NodeFacts(
        name=name,
        address=address,
        hostname=socket.gethostname(),
        python=".".join(str(part) for part in sys.version_info[:3]),
        versions={package: _version(package) for package in (*PACKAGES, "prefray")},
        code=code_digest(),
        memory=machine_memory(),
        # torch takes seconds to import.
        gpus=find_gpus() if gpus else Gpus(),
        interfaces={interface: addresses for interface, addresses in interfaces.items() if addresses},
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        shared_memory=shared_memory(),
        disks=_free_disks(probe),
        unwritable={
            **_each(probe.folders.items(), lambda folder: _write(folder, probe.run, name)),
            **_each(_caches(probe), NodeCache.problem),
        },
        unreachable=_each(((resource.key, resource) for resource in probe.resources), Resource.problem),
        plugins=_load(probe.plugins),
    )


def list_probes(probe: ProbeRequest) -> dict[str, list[str]]:
    """Return key of a folder -> names of the nodes whose probe files can be read there from this node."""
    prefix = f"{PROBE}{probe.run}-"
    seen: dict[str, list[str]] = {}
    for key, folder in probe.folders.items():
        try:
            # Read back too: a name in a listing isn't yet a file that this node can read.
            names = [name for name in folder.names() if name.startswith(prefix) and folder.read(name) == probe.run]
        except STORAGE_ERRORS:  # reported by `inspect_node`, or visible by the missing files
            names = []
        seen[key] = sorted(name.removeprefix(prefix) for name in names)
    return seen


def remove_probes(probe: ProbeRequest) -> None:
    """Delete the nodes' probe files, and folders that are empty then."""
    for folder in probe.folders.values():
        for name in folder.names():
            if name.startswith(f"{PROBE}{probe.run}-"):
                folder.delete(name)
        folder.remove_if_empty()


@cache
def code_digest() -> str:
    """Return a hash of prefray's Python files."""
    digest = hashlib.sha256()
    for folder in our_packages():
        for path in sorted(folder.rglob("*.py")):
            # Contents alone: the folders of nodes differ.
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _each(items: Iterable[tuple[str, T]], look: Callable[[T], str | None]) -> dict[str, str]:
    problems = ((key, look(item)) for key, item in items)
    return {key: problem for key, problem in problems if problem is not None}


def _load(plugins: Plugins) -> str | None:
    try:
        plugins.load()
    except PluginError as error:
        return str(error)
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(folder: Folder, run: str, name: str) -> str | None:
    try:
        # As a run would: a missing output_dir is no problem if it can be made.
        folder.create()
        folder.write(f"{PROBE}{run}-{name}", run)
    except STORAGE_ERRORS as error:
        return reason(error)
    return None


def _caches(probe: ProbeRequest) -> list[tuple[str, NodeCache]]:
    return [(CACHE, NodeCache.of(probe.ray))] if probe.ray is not None else []


def _free_disks(probe: ProbeRequest) -> dict[str, int]:
    import ray

    paths = {key: str(folder.where) for key, folder in probe.folders.items() if not is_uri(str(folder.where))}
    paths |= {key: str(cache.root) for key, cache in _caches(probe)}
    paths[TEMPORARY] = tempfile.gettempdir()
    # Ray's session folder takes spilled objects and logs.
    if ray.is_initialized():
        paths["Ray's files"] = ray.get_runtime_context().get_temp_dir()
    return {key: shutil.disk_usage(_nearest(Path(path))).free for key, path in paths.items()}


def _nearest(path: Path) -> Path:
    """Return the folder or its nearest existing parent."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
