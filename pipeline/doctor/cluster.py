"""Checks of a cluster: whether its nodes agree, and have what a recipe needs."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cluster.placement import plan_actors
from pipeline.doctor.checks import Check
from pipeline.doctor.machine import Gpu
from pipeline.doctor.node import CACHE, TEMPORARY, NodeFacts, ProbeRequest, Resource
from pipeline.doctor.nodes import ProbeReport
from pipeline.io.cache import CACHE_VARIABLE
from pipeline.planning import plan_run
from strategies.methods.registry import get_strategy

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["check_checkpoint", "check_network", "check_nodes", "check_resources", "quick_checks"]

VARIABLE = "GLOO_SOCKET_IFNAME"


def check_network(facts: Iterable[NodeFacts]) -> Iterator[Check]:
    """Check the interface that gloo will use on each node: GLOO_SOCKET_IFNAME, else the one with the node's address."""
    nodes = list(facts)
    if len({node.address for node in nodes}) < 2:  # one node, or several on one machine
        return
    problems, taken = [], {}
    for node in nodes:
        interface, problem = _interface(node)
        if problem is not None:
            problems.append(f"{node.name}: {problem}")
        else:
            taken[node.name] = interface
    if problems:
        yield Check("gloo interface", "fail", "; ".join(problems))
    else:
        yield Check("gloo interface", "pass", ", ".join(f"{interface} on {name}" for name, interface in taken.items()))


def _interface(node: NodeFacts) -> tuple[str | None, str | None]:
    """Return (interface, None), or (None, what is wrong)."""
    if node.gloo_interface is not None:
        if node.gloo_interface not in node.interfaces:
            existing = ", ".join(node.interfaces)
            return (
                None,
                f"{VARIABLE}={node.gloo_interface} names none of its interfaces ({existing}); set it right, or unset it",
            )
        return node.gloo_interface, None
    try:
        is_loopback = ipaddress.ip_address(node.address).is_loopback
    except ValueError:
        return None, f"the cluster knows it as {node.address!r}; start Ray there with --node-ip-address, or set {VARIABLE}"
    if is_loopback:
        return None, "the cluster knows it by its loopback address; start Ray there with --node-ip-address"
    for interface, addresses in node.interfaces.items():
        if node.address in addresses:
            return interface, None
    return None, f"none of its interfaces has the address that the cluster knows; set {VARIABLE} there"


LITTLE_DISK = 10 * 2**30
IMAGE = "build all nodes from one image (Dockerfile, constraints.txt)"


def quick_checks(report: ProbeReport, folders: Iterable[str]) -> Iterator[Check]:
    """Run the checks that are made before every run on several nodes: versions, network, plugins, storage, cache."""
    for name, why in report.silent.items():
        yield Check(f"node {name}", "fail", f"doesn't answer: {why}")
    nodes = list(report.facts.values())
    if not nodes:
        return
    yield from _versions(nodes)
    yield from check_network(nodes)
    if problems := {node.name: node.plugins for node in nodes if node.plugins is not None}:
        yield Check("plugins", "fail", f"{_each_node(problems)}; submit from their folder, or install them everywhere")
    for key in folders:
        yield _storage(key, report)
    if all(CACHE in node.disks for node in nodes):
        yield _cache(nodes)


def check_nodes(report: ProbeReport, probe: ProbeRequest, object_stores: dict[str, float]) -> Iterator[Check]:
    """Run all checks of the nodes.

    Args:
        object_stores: node -> bytes of Ray's object store, which is in shared memory.
    """
    yield from quick_checks(report, probe.folders)
    nodes = list(report.facts.values())
    for resource in probe.resources:
        yield _reachable(resource, nodes)
    if nodes:
        yield _disks(nodes)
        yield _shared_memory(nodes, object_stores)
        yield from _gpus(nodes)


def check_resources(cfg: RunConfig, nodes: list[dict[str, float]], has_autoscaler: bool) -> Iterator[Check]:
    """Check that training workers and scoring actors fit, each stage alone."""
    try:
        plan = plan_run(cfg, nodes)
        each = ", ".join(f"{amount:g} {name}" for name, amount in plan.resources.items())
        workers = f"{cfg.num_workers} worker{'s' * (cfg.num_workers != 1)}"
        yield Check("training workers", "pass", f"{workers} of {each}: they fit")
    except ValueError as error:
        yield _lack("training workers", error, has_autoscaler)
    if get_strategy(cfg.rl).reference_mode(cfg) == "cached":
        # The number of tasks is unknown before the data are prepared, so at most one actor per CPU is assumed.
        config, cpus = cfg.ray.score, sum(node.get("CPU", 0.0) for node in nodes)
        most = config.num_actors or max(1, int(cpus))
        try:
            actors = plan_actors(config.num_actors, cfg.ray.use_gpu, config.actor_resources(), nodes, most)
            each = ", ".join(f"{amount:g} {name}" for name, amount in actors.resources.items())
            yield Check("scoring actors", "pass", f"up to {actors.num_actors} of {each}")
        except ValueError as error:
            yield _lack("scoring actors", error, has_autoscaler)


def check_checkpoint(size: int, nodes: Iterable[NodeFacts]) -> Check:
    """Check that each node's temporary folder has room for a checkpoint, which is staged there on its way to storage.

    Args:
        size: of a checkpoint, in bytes.
    """
    free = {node.name: node.disks[TEMPORARY] for node in nodes}
    finding = f"up to {_gib(size)}, of which a node holds one at most (in the temporary folder) until it is stored"
    if small := [f"{name} has {_gib(amount)} free" for name, amount in free.items() if amount < size]:
        return Check(
            "checkpoint", "fail", f"{finding}; {', '.join(small)}: set TMPDIR to a folder with room, before Ray starts"
        )
    return Check("checkpoint", "pass", finding)


def _lack(name: str, error: ValueError, has_autoscaler: bool) -> Check:
    later = " (the cluster scales: nodes may come)" if has_autoscaler else ""
    # The nodes of now say little about a cluster that grows on demand.
    return Check(name, "warn" if has_autoscaler else "fail", f"{error}{later}")


def _versions(nodes: list[NodeFacts]) -> Iterator[Check]:
    location = f"on {len(nodes)} nodes" if len(nodes) > 1 else "here"
    installed: dict[str, dict[str, str | None]] = {"Python": {node.name: node.python for node in nodes}}
    for package in nodes[0].versions:
        installed[package] = {node.name: node.versions[package] for node in nodes}
    installed["prefray's code"] = {node.name: node.code for node in nodes}
    # Our packages are uploaded with the runtime environment, so they needn't be installed.
    installed.pop("prefray")
    fine = []
    for name, versions in installed.items():
        different = sorted({str(version) for version in versions.values()})
        if len(different) > 1:
            each = ", ".join(f"{version or 'none'} on {node}" for node, version in versions.items())
            yield Check(f"version of {name}", "fail", f"{each}; {IMAGE}")
        elif different == ["None"]:
            yield Check(f"version of {name}", "fail", f"isn't installed {location}; {IMAGE}")
        elif name in ("Python", "ray", "torch", "prefray's code"):
            fine.append(f"{name} {different[0]}")
    yield Check("versions", "pass", f"{', '.join(fine)}, and {len(installed) - len(fine)} more, {location}")


def _storage(key: str, report: ProbeReport) -> Check:
    problems = {name: node.unwritable[key] for name, node in report.facts.items() if key in node.unwritable}
    if problems:
        return Check(key, "fail", "can't be written: " + _each_node(problems))
    # Only nodes that answered can have written a probe file.
    nodes = set(report.facts)
    blind = {name: sorted(nodes - set(seen.get(key, []))) for name, seen in report.seen.items()}
    if any(blind.values()):
        who = "; ".join(f"{name} doesn't see what {', '.join(missing)} wrote" for name, missing in blind.items() if missing)
        return Check(
            key,
            "fail",
            f"isn't the same folder on every node: {who}; give a URI such as s3://bucket/run, or a path that all nodes share",
        )
    shared = f"written and seen by {len(nodes)} nodes" if len(nodes) > 1 else "can be written"
    return Check(key, "pass", shared)


def _reachable(resource: Resource, nodes: list[NodeFacts]) -> Check:
    problems = {node.name: node.unreachable[resource.key] for node in nodes if resource.key in node.unreachable}
    if problems:
        return Check(resource.key, "fail", f"{resource.value!r} can't be reached: {_each_node(problems)}")
    return Check(resource.key, "pass", f"{resource.value} can be reached{f' from {len(nodes)} nodes' * (len(nodes) > 1)}")


def _each_node(problems: dict[str, str]) -> str:
    reasons = set(problems.values())
    if len(reasons) == 1:
        return f"{reasons.pop()} (on {', '.join(problems)})"
    return "; ".join(f"{why} (on {name})" for name, why in problems.items())


def _cache(nodes: list[NodeFacts]) -> Check:
    problems = {node.name: node.unwritable[CACHE] for node in nodes if CACHE in node.unwritable}
    if problems:
        return Check("node cache", "fail", f"can't be written: {_each_node(problems)}; set {CACHE}, or {CACHE_VARIABLE} there")
    least, name = min((node.disks[CACHE], node.name) for node in nodes)
    return Check("node cache", "pass", f"at least {_gib(least)} free for rows and models (on {name})")


def _disks(nodes: list[NodeFacts]) -> Check:
    free = [(amount, what, node.name) for node in nodes for what, amount in node.disks.items()]
    if not free:
        return Check("disk", "pass", "nothing is written to disks")
    # The fullest disk decides: a run stops where the first one is full.
    least, what, name = min(free)
    finding = f"at least {_gib(least)} free ({what} on {name})"
    if least < LITTLE_DISK:
        advice = "a checkpoint of a full model takes 3 times its weights, and Ray stops at 95 % of a disk"
        return Check("disk", "warn", f"{finding}; {advice}")
    return Check("disk", "pass", finding)


def _shared_memory(nodes: list[NodeFacts], object_stores: dict[str, float]) -> Check:
    small = []
    for node in nodes:
        needed = object_stores.get(node.name, 0.0)
        # The total, not what is free: the store itself lies there.
        if node.shared_memory is not None and node.shared_memory[0] < needed:
            small.append(f"{node.name} has {_gib(node.shared_memory[0])} for an object store of {_gib(needed)}")
    if small:
        advice = "start containers with --shm-size, pods with a memory-backed emptyDir at /dev/shm"
        return Check("shared memory", "warn", f"{', '.join(small)}, and the rest goes to disk; {advice}")
    sizes = [node.shared_memory[0] for node in nodes if node.shared_memory is not None]
    return Check("shared memory", "pass", f"at least {_gib(min(sizes))}" if sizes else "none on this system")


def _gpus(nodes: list[NodeFacts]) -> Iterator[Check]:
    for node in nodes:
        if node.gpus.problem is not None:
            yield Check("GPUs", "fail", f"Ray counts GPUs on {node.name}, and {node.gpus.problem}; {IMAGE}")
    found = {node.name: node.gpus.found for node in nodes if node.gpus.found}
    if not found:
        return
    kinds = {gpu.name for gpus in found.values() for gpu in gpus}
    finding = "; ".join(f"{name}: {_shown(gpus)}" for name, gpus in found.items())
    mixed = "; the slowest one sets the pace" if len(kinds) > 1 else ""
    yield Check("GPUs", "warn" if mixed else "pass", finding + mixed)
    # Sorted as text, since a version may be None.
    libraries = {(node.gpus.cuda, node.gpus.nccl) for node in nodes if node.gpus.found}
    finding = ", ".join(f"CUDA {cuda}, NCCL {nccl or 'none'}" for cuda, nccl in sorted(libraries, key=str))
    yield Check("NCCL", "pass" if len(libraries) == 1 and all(nccl for _, nccl in libraries) else "fail", finding)


def _shown(gpus: tuple[Gpu, ...]) -> str:
    first = gpus[0]
    return f"{len(gpus)} x {first.name} with {_gib(first.total)}, {_gib(min(gpu.free for gpu in gpus))} free"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
