"""Checks of a cluster: its nodes among each other, and against what a recipe asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cluster.preflight import plan_actors
from pipeline.doctor.checks import Check
from pipeline.doctor.machine import Gpu
from pipeline.doctor.network import check_network
from pipeline.doctor.node import NodeFacts, Probe, Thing
from pipeline.doctor.nodes import Answers

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["check_nodes", "check_resources", "quick_checks"]

LITTLE_DISK = 10 * 2**30
IMAGE = "build all nodes from one image (Dockerfile, constraints.txt)"


def quick_checks(answers: Answers, folders: Iterable[str]) -> Iterator[Check]:
    """What a run on several nodes stands or falls with."""
    for name, why in answers.silent.items():
        yield Check(f"node {name}", "fail", f"doesn't answer: {why}")
    nodes = list(answers.facts.values())
    if not nodes:
        return
    yield from _versions(nodes)
    yield from check_network(nodes)
    if problems := {node.name: node.plugins for node in nodes if node.plugins is not None}:
        yield Check("plugins", "fail", f"{_each_node(problems)}; submit from their folder, or install them everywhere")
    for key in folders:
        yield _storage(key, answers)


def check_nodes(answers: Answers, probe: Probe, object_stores: dict[str, float]) -> Iterator[Check]:
    """Everything that nodes tell.

    Args:
        object_stores: node -> bytes that Ray means to put into shared memory there.
    """
    yield from quick_checks(answers, probe.folders)
    nodes = list(answers.facts.values())
    for thing in probe.things:
        yield _reachable(thing, nodes)
    if nodes:
        yield _disks(nodes)
        yield _shared_memory(nodes, object_stores)
        yield from _gpus(nodes)


def check_resources(cfg: RunConfig, nodes: list[dict[str, float]], has_autoscaler: bool) -> Iterator[Check]:
    """Whether training workers and scoring actors fit, each at once."""
    from pipeline.training.driver import plan_run
    from strategies.registry import get_strategy

    try:
        plan = plan_run(cfg, nodes)
        each = ", ".join(f"{amount:g} {name}" for name, amount in plan.resources.items())
        number = f"{cfg.num_workers} worker{'s' * (cfg.num_workers != 1)}"
        yield Check("training workers", "pass", f"{number} of {each}: they fit")
    except ValueError as error:
        yield _lack("training workers", error, has_autoscaler)
    if get_strategy(cfg.rl).reference_mode(cfg) == "cached":
        given, cpus = cfg.ray.score, sum(node.get("CPU", 0.0) for node in nodes)
        most = given.num_actors or max(1, int(cpus))
        try:
            actors = plan_actors(given.num_actors, cfg.ray.use_gpu, given.actor_resources(), nodes, most)
            each = ", ".join(f"{amount:g} {name}" for name, amount in actors.resources.items())
            yield Check("scoring actors", "pass", f"up to {actors.num_actors} of {each}")
        except ValueError as error:
            yield _lack("scoring actors", error, has_autoscaler)


def _lack(name: str, error: ValueError, has_autoscaler: bool) -> Check:
    later = " (the cluster scales: nodes may come)" if has_autoscaler else ""
    return Check(name, "warn" if has_autoscaler else "fail", f"{error}{later}")


def _versions(nodes: list[NodeFacts]) -> Iterator[Check]:
    where = f"on {len(nodes)} nodes" if len(nodes) > 1 else "here"
    said: dict[str, dict[str, str | None]] = {"Python": {node.name: node.python for node in nodes}}
    for package in nodes[0].versions:
        said[package] = {node.name: node.versions[package] for node in nodes}
    said["prefray's code"] = {node.name: node.code for node in nodes}
    # Ray brings our packages along, so they needn't be installed.
    said.pop("prefray")
    fine = []
    for name, versions in said.items():
        different = sorted({str(version) for version in versions.values()})
        if len(different) > 1:
            each = ", ".join(f"{version or 'none'} on {node}" for node, version in versions.items())
            yield Check(f"version of {name}", "fail", f"{each}; {IMAGE}")
        elif different == ["None"]:
            yield Check(f"version of {name}", "fail", f"isn't installed {where}; {IMAGE}")
        elif name in ("Python", "ray", "torch", "prefray's code"):
            fine.append(f"{name} {different[0]}")
    yield Check("versions", "pass", f"{', '.join(fine)}, and {len(said) - len(fine)} more, {where}")


def _storage(key: str, answers: Answers) -> Check:
    problems = {name: node.unwritable[key] for name, node in answers.facts.items() if key in node.unwritable}
    if problems:
        return Check(key, "fail", "can't be written: " + _each_node(problems))
    nodes = set(answers.facts)
    blind = {name: sorted(nodes - set(seen.get(key, []))) for name, seen in answers.seen.items()}
    if any(blind.values()):
        who = "; ".join(f"{name} doesn't see what {', '.join(missing)} wrote" for name, missing in blind.items() if missing)
        return Check(key, "fail", f"isn't the same folder on every node: {who}; give a path that all nodes share{_or_uri(key)}")
    shared = f"written and seen by {len(nodes)} nodes" if len(nodes) > 1 else "can be written"
    return Check(key, "pass", shared)


def _or_uri(key: str) -> str:
    return ", or a URI such as s3://bucket/run" if key == "output_dir" else ""


def _reachable(thing: Thing, nodes: list[NodeFacts]) -> Check:
    problems = {node.name: node.unreachable[thing.key] for node in nodes if thing.key in node.unreachable}
    if problems:
        return Check(thing.key, "fail", f"{thing.value!r} can't be reached: {_each_node(problems)}")
    return Check(thing.key, "pass", f"{thing.value} can be reached{f' from {len(nodes)} nodes' * (len(nodes) > 1)}")


def _each_node(problems: dict[str, str]) -> str:
    reasons = set(problems.values())
    if len(reasons) == 1:
        return f"{reasons.pop()} (on {', '.join(problems)})"
    return "; ".join(f"{why} (on {name})" for name, why in problems.items())


def _disks(nodes: list[NodeFacts]) -> Check:
    free = [(amount, what, node.name) for node in nodes for what, amount in node.disks.items()]
    if not free:
        return Check("disk", "pass", "nothing is written to disks")
    least, what, name = min(free)
    finding = f"at least {_gib(least)} free ({what} on {name})"
    if least < LITTLE_DISK:
        advice = "a checkpoint of a full model takes 3 times its weights, and Ray stops at 95 % of a disk"
        return Check("disk", "warn", f"{finding}; {advice}")
    return Check("disk", "pass", finding)


def _shared_memory(nodes: list[NodeFacts], object_stores: dict[str, float]) -> Check:
    small = []
    for node in nodes:
        wanted = object_stores.get(node.name, 0.0)
        if node.shared_memory is not None and node.shared_memory[0] < wanted:
            small.append(f"{node.name} has {_gib(node.shared_memory[0])} for an object store of {_gib(wanted)}")
    if small:
        advice = "start containers with --shm-size, pods with a memory-backed emptyDir at /dev/shm"
        return Check("shared memory", "warn", f"{', '.join(small)}, and the rest goes to disk; {advice}")
    known = [node.shared_memory[0] for node in nodes if node.shared_memory is not None]
    return Check("shared memory", "pass", f"at least {_gib(min(known))}" if known else "none on this system")


def _gpus(nodes: list[NodeFacts]) -> Iterator[Check]:
    for node in nodes:
        if node.gpus.problem is not None:
            yield Check("GPUs", "fail", f"Ray counts GPUs on {node.name}, and {node.gpus.problem}; {IMAGE}")
    seen = {node.name: node.gpus.found for node in nodes if node.gpus.found}
    if not seen:
        return
    kinds = {gpu.name for gpus in seen.values() for gpu in gpus}
    finding = "; ".join(f"{name}: {_shown(gpus)}" for name, gpus in seen.items())
    mixed = "; the slowest one sets the pace" if len(kinds) > 1 else ""
    yield Check("GPUs", "warn" if mixed else "pass", finding + mixed)
    libraries = {(node.gpus.cuda, node.gpus.nccl) for node in nodes if node.gpus.found}
    words = ", ".join(f"CUDA {cuda}, NCCL {nccl or 'none'}" for cuda, nccl in sorted(libraries, key=str))
    yield Check("NCCL", "pass" if len(libraries) == 1 and all(nccl for _, nccl in libraries) else "fail", words)


def _shown(gpus: tuple[Gpu, ...]) -> str:
    first = gpus[0]
    return f"{len(gpus)} x {first.name} with {_gib(first.total)}, {_gib(min(gpu.free for gpu in gpus))} free"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
