"""Inspection of every node of the cluster that this process has joined."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.data.sources.filesystem import local_path
from pipeline.doctor.node import NodeFacts, ProbeRequest, Resource, inspect_node, list_probes, remove_probes
from pipeline.errors import UserError
from pipeline.io.remote_models import fetch_models, find_models
from pipeline.io.retry import STORAGE_ERRORS, waiting_for
from pipeline.io.storage import Folder, is_uri, locate, reason
from pipeline.ray.session import alive_nodes
from strategies.plugins import Plugins

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["ProbeReport", "ask_nodes", "names_of", "probe_request"]

ANSWER_WITHIN_S = 300
"""Starting a process, with the job's files, on a node that is busy or has its Python on a network drive, takes minutes.
The cluster itself notices lost nodes within half a minute."""


@dataclass(frozen=True)
class ProbeReport:
    """Results of inspecting all nodes."""

    facts: dict[str, NodeFacts] = field(default_factory=dict)
    """Node -> its results."""
    silent: dict[str, str] = field(default_factory=dict)
    """Node -> why it has no results."""
    seen: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Node -> key of a folder -> nodes whose probe files it sees there."""


def _folders_of(cfg: RunConfig) -> dict[str, Folder]:
    """Return the folders that a run writes to, by the recipe's keys.

    Raises:
        UserError: when a URI can't be opened.
    """
    folders = {}
    for key in ("output_dir", "dataset_prepared_path"):
        try:
            folders[key] = Folder(locate(getattr(cfg, key)))
        except STORAGE_ERRORS as error:
            raise UserError(f"{key}: {getattr(cfg, key)!r} can't be reached: {reason(error)}") from error
    return folders


def probe_request(cfg: RunConfig | None, *, with_resources: bool) -> ProbeRequest:
    """Build the request for a recipe.

    Args:
        with_resources: also check that its models and data can be reached.
    """
    # Two examinations at once must not take each other's files for their own.
    run = uuid.uuid4().hex[:8]
    if cfg is None:
        return ProbeRequest(run)
    resources = []
    if with_resources:
        models = [(key, getattr(cfg, key)) for key in ("base_model", "reference_model", "lora_model_dir")]
        fetch_models(cfg)
        remote = {model.uri: model for model in find_models(cfg).models}
        resources += [Resource(key, value, "model", remote.get(value)) for key, value in models if value is not None]
        for name in ("datasets", "test_datasets"):
            paths = [_as_tasks_read_it(dataset.path) for dataset in getattr(cfg, name) or []]
            resources += [Resource(f"{name}.{index}", path, "data") for index, path in enumerate(paths)]
    folders = {key: folder.carried() for key, folder in _folders_of(cfg).items()}
    return ProbeRequest(run, folders, tuple(resources), Plugins.of(cfg), cfg.ray)


def _as_tasks_read_it(path: str) -> str:
    """Return the absolute path of local data, as tasks get it; other values may be hub ids, and stay."""
    absolute = local_path(path)
    return path if is_uri(absolute) or not (os.path.exists(absolute) or glob.has_magic(absolute)) else absolute


def names_of(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Return id of a node -> its name: its address, with a part of the id where several nodes share one."""
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    if len(set(names.values())) < len(names):
        return {node: f"{name}:{node[:6]}" for node, name in names.items()}
    return names


def ask_nodes(probe: ProbeRequest, nodes: list[dict[str, Any]]) -> ProbeReport:
    """Inspect every node; each writes a probe file to storage, and lists those of the others.

    Args:
        nodes: alive nodes, of `ray.nodes()`.
    """
    names = names_of(nodes)
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in nodes}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    # Two rounds: every node must have written before any lists what it sees.
    facts, silent = _on_each(names, lambda node: (inspect_node, probe, names[node], addresses[node], gpus[node]))
    alive = {node["NodeID"] for node in alive_nodes()}
    for node, name in names.items():
        if node not in alive:  # it was lost shortly before, which the cluster has noticed meanwhile
            silent.pop(name, None)
    responsive = {node: name for node, name in names.items() if name in facts}
    try:
        seen, _ = _on_each(responsive, lambda _: (list_probes, probe))
    finally:
        for node in responsive:  # one that can delete removes the files of all
            if not _on_each({node: names[node]}, lambda _: (remove_probes, probe))[1]:
                break
    return ProbeReport(facts, silent, seen)


def _on_each(names: dict[str, str], what: Callable[[str], tuple[Any, ...]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Call a function on all nodes in parallel; return results, and why others have none, by name of the node."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def start(node: str) -> Any:
        function, *arguments = what(node)
        # soft=False: on another node the answer would be of the wrong one.
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        # No CPUs: a node that is fully in use answers too. No retries: a node that kills the task is a finding.
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(function).remote(*arguments)

    running = {node: start(node) for node in names}
    with waiting_for(f"{len(names)} nodes to answer"):
        ready, _ = ray.wait(list(running.values()), num_returns=len(running), timeout=ANSWER_WITHIN_S)
    results, silent = {}, {}
    for node, task in running.items():
        try:
            results[names[node]] = ray.get(task, timeout=0 if task in ready else 0.1)
        except GetTimeoutError:
            silent[names[node]] = f"no answer within {ANSWER_WITHIN_S} s"
            ray.cancel(task, force=True)
        except RayError as error:
            lines = str(error).strip().splitlines()
            silent[names[node]] = lines[-1] if lines else type(error).__name__
    return results, silent
