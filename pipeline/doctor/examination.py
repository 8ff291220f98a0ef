"""The examination of a recipe, and of the machine or cluster that it is to run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.addresses import listens_openly
from cluster.preflight import WorkerPlan
from pipeline.doctor.checks import Check
from pipeline.doctor.cluster import check_nodes, check_resources, quick_checks
from pipeline.doctor.machine import Machine
from pipeline.doctor.memory import Diagnosis, Room, diagnose, usable, verdict
from pipeline.doctor.node import NodeFacts, Probe, inspect_node, list_probes, remove_probes
from pipeline.doctor.nodes import Answers, ask_nodes, names_of, probe_of
from pipeline.errors import UserError
from pipeline.notebook import html_of
from pipeline.paths import absolute_paths

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["Examination", "check_before_run", "examine"]


@dataclass(frozen=True)
class Examination:
    """What was found."""

    checks: tuple[Check, ...]
    diagnosis: Diagnosis | None
    """Of the memory; None without a recipe."""

    @property
    def failed(self) -> bool:
        """Whether something is in the way of a run."""
        return bool(self._failing()) or (self.diagnosis is not None and not self.diagnosis.fits)

    def verdict(self, cfg: RunConfig | None) -> str:
        """What it comes to, in words."""
        words = []
        if failing := self._failing():
            words.append(f"{len(failing)} check{'s' * (len(failing) != 1)} failed: {', '.join(failing)}")
        if self.diagnosis is not None and cfg is not None:
            words.append(verdict(cfg, self.diagnosis))
        return "; ".join(words) or "nothing is in the way"

    def _repr_html_(self) -> str:
        from pipeline.tables import print_examination

        return html_of(lambda console: print_examination(self, console))

    def _failing(self) -> list[str]:
        return [check.name for check in self.checks if check.status == "fail"]


def examine(cfg: RunConfig | None, *, with_measurement: bool = False) -> Examination:
    """Look at everything: at this machine, or at every node of the cluster that the config or the environment names.

    Args:
        cfg: the recipe; None to look at the cluster alone.
        with_measurement: also train two steps of the largest forwards here.

    Raises:
        UserError: for a recipe that can't be trained anywhere, or a cluster that can't be joined.
        RunFailed: when the measured process ended early.
    """
    cfg = absolute_paths(cfg) if cfg is not None else None
    probe = probe_of(cfg, with_things=True)
    if (cfg is None or cfg.ray.address is None) and not os.environ.get("RAY_ADDRESS"):
        return _examine_here(cfg, probe, with_measurement)
    from pipeline.session import alive_nodes, connect, potential_nodes

    connect(cfg)
    nodes = alive_nodes()
    answers = ask_nodes(probe, nodes)
    names = names_of(nodes)
    stores = {names[node["NodeID"]]: node["Resources"].get("object_store_memory", 0.0) for node in nodes}
    has_autoscaler = bool(potential_nodes())
    checks = [_cluster(nodes, has_autoscaler), *check_nodes(answers, probe, stores), *_exposure()]
    if cfg is None:
        return Examination(tuple(checks), None)
    checks += [*check_resources(cfg, [node["Resources"] for node in nodes], has_autoscaler), *_trackers(cfg)]
    by_name = {names[node["NodeID"]]: node["Resources"] for node in nodes}
    diagnosis = diagnose(cfg, _tightest(cfg, answers, by_name), with_measurement=with_measurement)
    return Examination((*checks, *diagnosis.checks), diagnosis)


def check_before_run(cfg: RunConfig) -> list[str]:
    """The quick part, on a cluster of several nodes that this process has joined; returns warnings.

    Raises:
        UserError: with everything that would make the run fail.
    """
    from pipeline.session import alive_nodes

    nodes = alive_nodes()
    if len(nodes) < 2:
        return []
    probe = probe_of(cfg, with_things=False)
    checks = list(quick_checks(ask_nodes(probe, nodes), probe.folders))
    if failed := [f"{check.name}: {check.finding}" for check in checks if check.status == "fail"]:
        raise UserError("\n".join([*failed, "(`prefray doctor RECIPE` looks at everything)"]))
    return [f"{check.name}: {check.finding}" for check in checks if check.status == "warn"]


def _examine_here(cfg: RunConfig | None, probe: Probe, with_measurement: bool) -> Examination:
    """Of this machine alone; Ray needn't be started for it."""
    import torch

    name, gpus = "this machine", torch.cuda.device_count()
    facts = inspect_node(probe, name, "127.0.0.1", gpus)
    answers = Answers({name: facts}, {}, {name: list_probes(probe)})
    remove_probes(probe)
    checks = list(check_nodes(answers, probe, {}))
    if cfg is None:
        return Examination(tuple(checks), None)
    here = {"CPU": float(os.cpu_count() or 1), **({"GPU": float(gpus)} if gpus else {})}
    checks += [*check_resources(cfg, [here], has_autoscaler=False), *_trackers(cfg)]
    diagnosis = diagnose(cfg, with_measurement=with_measurement)
    return Examination((*checks, *diagnosis.checks), diagnosis)


def _trackers(cfg: RunConfig) -> Iterator[Check]:
    """Whether a driver here could report to the recipe's trackers."""
    from pipeline.tracking.tracking import check_trackers
    from strategies.trackers import used_trackers

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
    """Whether others can run programs on the cluster."""
    from pipeline.session import dashboard_url

    if (url := dashboard_url()) is not None and listens_openly(url):
        finding = (
            f"the dashboard listens at {url} and asks for no token: whoever reaches it can run programs here; start Ray with "
            "RAY_AUTH_MODE=token, or without --dashboard-host"
        )
        yield Check("dashboard", "warn", finding)


def _tightest(cfg: RunConfig, answers: Answers, resources: dict[str, dict[str, float]]) -> Room | None:
    """Of the nodes that may get workers, the one with the least memory for each."""
    from pipeline.training.driver import plan_run

    try:
        plan = plan_run(cfg, list(resources.values()))
    except ValueError:  # said by another check
        return None
    rooms = [room for name, facts in answers.facts.items() if (room := _room(name, facts, plan, resources[name])) is not None]
    return min(rooms, key=lambda room: usable(room.machine) / room.workers, default=None)


def _room(name: str, facts: NodeFacts, plan: WorkerPlan, resources: dict[str, float]) -> Room | None:
    """What workers would find on a node, as many as it may get; None where it gets none."""
    most = min(int(resources.get(each, 0.0) // amount) for each, amount in plan.resources.items() if amount)
    if most == 0:
        return None
    if plan.use_gpu and (gpus := facts.gpus.found):
        return Room(Machine("GPU", min(gpu.total for gpu in gpus), min(gpu.free for gpu in gpus)), 1, f"a GPU of {name}")
    return Room(facts.memory, min(most, plan.num_workers), f"node {name}")
