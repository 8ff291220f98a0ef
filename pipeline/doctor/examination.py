"""`prefray doctor`: checks of a recipe, and of the machine or cluster to run it on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cluster.addresses import is_public
from cluster.placement import WorkerPlan
from pipeline.config.paths import absolute_paths
from pipeline.doctor.checks import Check
from pipeline.doctor.cluster import check_checkpoint, check_nodes, check_resources, quick_checks
from pipeline.doctor.machine import Machine
from pipeline.doctor.memory import Room, diagnose, usable
from pipeline.doctor.node import NodeFacts, ProbeRequest, inspect_node, list_probes, remove_probes
from pipeline.doctor.nodes import ProbeReport, ask_nodes, names_of, probe_request
from pipeline.doctor.result import Examination
from pipeline.errors import UserError
from pipeline.io.cache import NodeCache
from pipeline.planning import plan_run
from pipeline.ray.session import alive_nodes, dashboard_url, init_ray, potential_nodes
from pipeline.tracking.dispatcher import check_trackers
from strategies.config.trackers import used_trackers

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["check_before_run", "examine"]


def examine(cfg: RunConfig | None, *, with_measurement: bool = False) -> Examination:
    """Run all checks on this machine, or on every node of the cluster that the config or the environment names.

    Args:
        cfg: the recipe; None to check the cluster alone.
        with_measurement: also train two steps of the largest forwards here, and measure their memory.

    Raises:
        UserError: for a recipe that can't be trained on any hardware, or a cluster that can't be joined.
        RunFailed: when the measured process ended early.
    """
    cfg = absolute_paths(cfg) if cfg is not None else None
    probe = probe_request(cfg, with_resources=True)
    # Without Ray, which takes 5 to 12 s to start and shows no more of a single machine.
    if (cfg is None or cfg.ray.address is None) and not os.environ.get("RAY_ADDRESS"):
        return _examine_here(cfg, probe, with_measurement)
    init_ray(cfg)
    nodes = alive_nodes()
    report = ask_nodes(probe, nodes)
    # Names, not ids: checks print them.
    names = names_of(nodes)
    stores = {names[node["NodeID"]]: node["Resources"].get("object_store_memory", 0.0) for node in nodes}
    has_autoscaler = bool(potential_nodes())
    checks = [_cluster(nodes, has_autoscaler), *check_nodes(report, probe, stores), *_exposure()]
    if cfg is None:
        return Examination(tuple(checks), None)
    checks += [*check_resources(cfg, [node["Resources"] for node in nodes], has_autoscaler), *_trackers(cfg)]
    by_name = {names[node["NodeID"]]: node["Resources"] for node in nodes}
    # On the cluster's smallest node, not this machine, which may be a head without GPUs.
    diagnosis = diagnose(cfg, _tightest(cfg, report, by_name), with_measurement=with_measurement)
    checks.append(check_checkpoint(diagnosis.estimate.checkpoint, report.facts.values()))
    return Examination((*checks, *diagnosis.checks), diagnosis)


def check_before_run(cfg: RunConfig) -> list[str]:
    """Run the quick checks on the cluster that this process has joined; return warnings.

    Raises:
        UserError: listing every failed check.
    """
    nodes = alive_nodes()
    # A single node shares its own folders and versions with itself.
    if len(nodes) < 2:
        NodeCache.of(cfg.ray).check()
        return []
    probe = probe_request(cfg, with_resources=False)
    checks = list(quick_checks(ask_nodes(probe, nodes), probe.folders))
    if failed := [f"{check.name}: {check.finding}" for check in checks if check.status == "fail"]:
        raise UserError("\n".join([*failed, "(`prefray doctor RECIPE` looks at everything)"]))
    return [f"{check.name}: {check.finding}" for check in checks if check.status == "warn"]


def _examine_here(cfg: RunConfig | None, probe: ProbeRequest, with_measurement: bool) -> Examination:
    """Run all checks on this machine, without starting Ray."""
    import torch

    name, gpus = "this machine", torch.cuda.device_count()
    facts = inspect_node(probe, name, "127.0.0.1", gpus)
    report = ProbeReport({name: facts}, {}, {name: list_probes(probe)})
    # On a cluster `ask_nodes` does this.
    remove_probes(probe)
    checks = list(check_nodes(report, probe, {}))
    if cfg is None:
        return Examination(tuple(checks), None)
    resources = {"CPU": float(os.cpu_count() or 1), **({"GPU": float(gpus)} if gpus else {})}
    checks += [*check_resources(cfg, [resources], has_autoscaler=False), *_trackers(cfg)]
    diagnosis = diagnose(cfg, with_measurement=with_measurement)
    checks.append(check_checkpoint(diagnosis.estimate.checkpoint, [facts]))
    return Examination((*checks, *diagnosis.checks), diagnosis)


def _trackers(cfg: RunConfig) -> Iterator[Check]:
    """Check that this process can log to the recipe's trackers."""
    if used := used_trackers(cfg):
        try:
            check_trackers(cfg)
            yield Check("trackers", "pass", f"{', '.join(used)} can be reported to")
        except UserError as error:
            yield Check("trackers", "fail", str(error))


def _cluster(nodes: list[dict[str, Any]], has_autoscaler: bool) -> Check:
    total: dict[str, float] = {}
    for node in nodes:
        for resource in ("CPU", "GPU"):
            total[resource] = total.get(resource, 0.0) + node["Resources"].get(resource, 0.0)
    have = ", ".join(f"{amount:g} {name}" for name, amount in total.items() if amount or name == "CPU")
    finding = f"{len(nodes)} node{'s' * (len(nodes) != 1)} with {have}"
    if not total["CPU"] and not has_autoscaler:
        return Check("cluster", "fail", f"{finding}: nothing can run; add nodes, and see whether some were lost (ray status)")
    return Check("cluster", "pass", finding)


def _exposure() -> Iterator[Check]:
    """Warn of a dashboard that lets anyone on the network run programs."""
    if (url := dashboard_url()) is not None and is_public(url):
        finding = (
            f"the dashboard listens at {url} and asks for no token: whoever reaches it can run programs here; start Ray with "
            "RAY_AUTH_MODE=token, or without --dashboard-host"
        )
        yield Check("dashboard", "warn", finding)


def _tightest(cfg: RunConfig, report: ProbeReport, resources: dict[str, dict[str, float]]) -> Room | None:
    """Return the memory of the node with the least for each worker, of those that may get workers."""
    try:
        plan = plan_run(cfg, list(resources.values()))
    except ValueError:  # `check_resources` reports it
        return None
    rooms = [room for name, facts in report.facts.items() if (room := _room(name, facts, plan, resources[name])) is not None]
    # Workers are equal, so the node with the least memory for each one decides.
    return min(rooms, key=lambda room: usable(room.machine) / room.workers, default=None)


def _room(name: str, facts: NodeFacts, plan: WorkerPlan, resources: dict[str, float]) -> Room | None:
    """Return a node's memory and the workers that would share it; None where none fits."""
    most = min(int(resources.get(each, 0.0) // amount) for each, amount in plan.resources.items() if amount)
    if most == 0:
        return None
    if plan.use_gpu and (gpus := facts.gpus.found):
        # Each worker has one GPU; on CPUs, workers of a node share its memory.
        return Room(Machine("GPU", min(gpu.total for gpu in gpus), min(gpu.free for gpu in gpus)), 1, f"a GPU of {name}")
    return Room(facts.memory, min(most, plan.num_workers), f"node {name}")
