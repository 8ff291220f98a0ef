"""Asks every node of the cluster that this process has joined."""

from __future__ import annotations

import glob
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.data.sources.filesystem import local_path
from pipeline.doctor.node import NodeFacts, Probe, Thing, inspect_node, list_probes, remove_probes
from pipeline.errors import UserError
from pipeline.patience import STORAGE_ERRORS
from pipeline.session import alive_nodes
from pipeline.storage import Folder, is_uri, locate, reason
from strategies.plugins import Plugins

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["Answers", "ask_nodes", "names_of", "probe_of"]

ANSWER_WITHIN_S = 90
"""Starting a process on a node, with what a job brings, and looking around there."""


@dataclass(frozen=True)
class Answers:
    """What the nodes have told."""

    facts: dict[str, NodeFacts] = field(default_factory=dict)
    """Node -> what it told."""
    silent: dict[str, str] = field(default_factory=dict)
    """Node -> why there is no answer."""
    seen: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """Node -> key of a folder -> nodes whose files it sees there."""


def _folders_of(cfg: RunConfig) -> dict[str, Folder]:
    """Where a run writes, by the recipe's keys.

    Raises:
        UserError: when there is no way to a URI.
    """
    found = {}
    for key in ("output_dir", "dataset_prepared_path"):
        try:
            found[key] = Folder(locate(getattr(cfg, key)))
        except STORAGE_ERRORS as error:
            raise UserError(f"{key}: {getattr(cfg, key)!r} can't be reached: {reason(error)}") from error
    return found


def probe_of(cfg: RunConfig | None, *, with_things: bool) -> Probe:
    """What to ask about a recipe.

    Args:
        with_things: also ask whether its models and data can be reached.
    """
    run = uuid.uuid4().hex[:8]
    if cfg is None:
        return Probe(run)
    things = []
    if with_things:
        models = [(key, getattr(cfg, key)) for key in ("base_model", "reference_model", "lora_model_dir")]
        things += [Thing(key, value, "model") for key, value in models if value is not None]
        for name in ("datasets", "test_datasets"):
            paths = [_as_tasks_read_it(dataset.path) for dataset in getattr(cfg, name) or []]
            things += [Thing(f"{name}.{index}", path, "data") for index, path in enumerate(paths)]
    folders = {key: folder.carried() for key, folder in _folders_of(cfg).items()}
    return Probe(run, folders, tuple(things), Plugins.of(cfg))


def _as_tasks_read_it(path: str) -> str:
    """Tasks are given absolute paths, wherever they run; what isn't there may be a hub id."""
    where = local_path(path)
    return path if is_uri(where) or not (os.path.exists(where) or glob.has_magic(where)) else where


def names_of(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Id of a node -> what to call it: its address, and a part of its id where several have one address."""
    names = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    if len(set(names.values())) < len(names):
        return {node: f"{name}:{node[:6]}" for node, name in names.items()}
    return names


def ask_nodes(probe: Probe, nodes: list[dict[str, Any]]) -> Answers:
    """Have every node look at itself, write to storage, and say whose files it sees there.

    Args:
        nodes: as `ray.nodes()` has them, alive ones.
    """
    names = names_of(nodes)
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in nodes}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in nodes}
    facts, silent = _on_each(names, lambda node: (inspect_node, probe, names[node], addresses[node], gpus[node]))
    alive = {node["NodeID"] for node in alive_nodes()}
    for node, name in names.items():
        if node not in alive:  # it was lost shortly before: the cluster has noticed in the meantime
            silent.pop(name, None)
    answering = {node: name for node, name in names.items() if name in facts}
    try:
        seen, _ = _on_each(answering, lambda _: (list_probes, probe))
    finally:
        for node in answering:
            if not _on_each({node: names[node]}, lambda _: (remove_probes, probe))[1]:
                break
    return Answers(facts, silent, seen)


def _on_each(names: dict[str, str], what: Callable[[str], tuple[Any, ...]]) -> tuple[dict[str, Any], dict[str, str]]:
    """Call a function on each node, at once; returns answers, and the reasons of those that gave none."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def start(node: str) -> Any:
        function, *arguments = what(node)
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(function).remote(*arguments)

    running = {node: start(node) for node in names}
    ready, _ = ray.wait(list(running.values()), num_returns=len(running), timeout=ANSWER_WITHIN_S)
    answers, silent = {}, {}
    for node, task in running.items():
        try:
            answers[names[node]] = ray.get(task, timeout=0 if task in ready else 0.1)
        except GetTimeoutError:
            silent[names[node]] = f"no answer within {ANSWER_WITHIN_S} s"
            ray.cancel(task, force=True)
        except RayError as error:
            lines = str(error).strip().splitlines()
            silent[names[node]] = lines[-1] if lines else type(error).__name__
    return answers, silent
