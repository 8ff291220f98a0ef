"""What one node of a cluster tells of itself. Runs there, in a task; loads torch only where there are GPUs."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from pipeline.doctor.machine import Gpus, Machine, find_gpus, machine_memory, shared_memory
from pipeline.doctor.reach import reach
from pipeline.patience import STORAGE_ERRORS
from pipeline.session import our_packages
from pipeline.storage import Folder, is_uri, reason
from strategies.plugins import PluginError, Plugins

__all__ = ["NodeFacts", "Probe", "Thing", "inspect_node", "list_probes", "remove_probes"]

PACKAGES = ("ray", "torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "datasets", "pyarrow", "numpy")
"""What has to be of one version everywhere."""
PROBE = ".prefray-probe-"
ADDRESSES = (socket.AF_INET, socket.AF_INET6)

T = TypeVar("T")


@dataclass(frozen=True)
class Thing:
    """A model or data that the recipe names."""

    key: str
    value: str
    kind: str
    """`model` or `data`."""


@dataclass(frozen=True)
class Probe:
    """What a node is asked."""

    run: str
    """Names this examination's files in storage."""
    folders: dict[str, Folder] = field(default_factory=dict)
    """Key of the recipe -> folder that the node must be able to write."""
    things: tuple[Thing, ...] = ()
    plugins: Plugins = field(default_factory=Plugins)


@dataclass(frozen=True)
class NodeFacts:
    """What a node tells."""

    name: str
    """What to call it."""
    address: str
    """By which the cluster knows it."""
    hostname: str
    python: str
    versions: dict[str, str | None]
    code: str
    """Hash of prefray's own files there."""
    memory: Machine
    gpus: Gpus
    """What torch finds, where Ray counts GPUs."""
    interfaces: dict[str, tuple[str, ...]]
    """Network interface -> its addresses."""
    gloo_interface: str | None
    """What GLOO_SOCKET_IFNAME says."""
    shared_memory: tuple[int, int] | None
    """Bytes of /dev/shm: all, and free."""
    disks: dict[str, int]
    """What it is for -> free bytes."""
    unwritable: dict[str, str]
    """Key of a folder -> what is wrong with writing to it."""
    unreachable: dict[str, str]
    """Key of a model or of data -> why it can't be reached."""
    plugins: str | None = None
    """Why the recipe's plugins can't be loaded; None where they can."""


def inspect_node(probe: Probe, name: str, address: str, gpus: float) -> NodeFacts:
    """Look at this node, and leave a file in every folder that it should write to.

    Args:
        name: what to call it.
        address: by which the cluster knows it.
        gpus: how many GPUs Ray counts here.
    """
    import psutil

    interfaces = {
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
        gpus=find_gpus() if gpus else Gpus(),
        interfaces={interface: addresses for interface, addresses in interfaces.items() if addresses},
        gloo_interface=os.environ.get("GLOO_SOCKET_IFNAME"),
        shared_memory=shared_memory(),
        disks=_free_disks(probe),
        unwritable=_each(probe.folders.items(), lambda folder: _write(folder, probe.run, name)),
        unreachable=_each(((thing.key, thing) for thing in probe.things), lambda thing: reach(thing.value, thing.kind)),
        plugins=_load(probe.plugins),
    )


def list_probes(probe: Probe) -> dict[str, list[str]]:
    """Key of a folder -> names of the nodes whose files can be read in it from here."""
    prefix = f"{PROBE}{probe.run}-"
    found: dict[str, list[str]] = {}
    for key, folder in probe.folders.items():
        try:
            names = [name for name in folder.names() if name.startswith(prefix) and folder.read(name) == probe.run]
        except STORAGE_ERRORS:  # said by `inspect_node` already, or seen by what is missing
            names = []
        found[key] = sorted(name.removeprefix(prefix) for name in names)
    return found


def remove_probes(probe: Probe) -> None:
    """Take the nodes' files away again, and folders that are empty then."""
    for folder in probe.folders.values():
        for name in folder.names():
            if name.startswith(f"{PROBE}{probe.run}-"):
                folder.delete(name)
        folder.remove_if_empty()


@cache
def code_digest() -> str:
    """Of prefray's own Python files."""
    digest = hashlib.sha256()
    for folder in our_packages():
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _each(things: Iterable[tuple[str, T]], look: Callable[[T], str | None]) -> dict[str, str]:
    problems = ((key, look(thing)) for key, thing in things)
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
        folder.create()
        folder.write(f"{PROBE}{run}-{name}", run)
    except STORAGE_ERRORS as error:
        return reason(error)
    return None


def _free_disks(probe: Probe) -> dict[str, int]:
    import ray

    places = {key: str(folder.where) for key, folder in probe.folders.items() if not is_uri(str(folder.where))}
    if ray.is_initialized():
        places["Ray's files"] = ray.get_runtime_context().get_temp_dir()
    return {key: shutil.disk_usage(_nearest(Path(place))).free for key, place in places.items()}


def _nearest(path: Path) -> Path:
    """The folder, or the one above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())
