"""What a manifest is written from, by a recipe: the command, and nodes that are large and many enough for it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.manifests import ManifestRequest
from pipeline.config.loading import apply_overrides, read_yaml
from pipeline.errors import UserError
from pipeline.jobs.manifest_checks import ManifestOptions, refuse_unfit
from pipeline.storage import is_uri, locate
from pipeline.tuning.folder import SWEEP

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["ManifestOptions", "recipe_with", "request_of"]

LEAST_CPUS = 4
"""Of a node: preparing and loading data take some beside those of the workers."""
GIB = 1 << 30


def recipe_with(recipe: str | Path, overrides: tuple[str, ...]) -> str:
    """A recipe's text with its overrides applied.

    Raises:
        UserError: as `load_config`.
    """
    return yaml.safe_dump(apply_overrides(read_yaml(Path(recipe)), overrides), sort_keys=False, allow_unicode=True)


def request_of(cfg: RunConfig, recipe_text: str, options: ManifestOptions) -> ManifestRequest:
    """Size the nodes for a recipe.

    Args:
        cfg: the validated recipe.
        recipe_text: the same as YAML (`recipe_with`).
        options: what isn't in the recipe.

    Raises:
        UserError: for what can't run on nodes that are started for it, or mustn't be written into a file.
    """
    refuse_unfit(cfg, recipe_text, options)
    least, most = _nodes(cfg, options)
    begun = options.command == "tune" and not is_uri(cfg.output_dir)
    return ManifestRequest(
        name=options.name or _name(options),
        command=options.command,
        recipe_text=recipe_text,
        output_dir=cfg.output_dir,
        min_nodes=least,
        max_nodes=most,
        node=_node(cfg, options),
        resume=options.resume,
        sweep_file=f"{locate(cfg.output_dir)}/{SWEEP}" if begun else None,
        image=options.image,
        mount=options.mount_path(),
        kubernetes=options.kubernetes,
        machines=options.machines,
        slurm=options.slurm,
    )


def _nodes(cfg: RunConfig, options: ManifestOptions) -> tuple[int, int]:
    """Nodes that are needed, and that there may be."""
    trials = (cfg.tune.max_concurrent_trials or 1) if options.command == "tune" and cfg.tune is not None else 1
    needed = math.ceil(cfg.min_workers / options.workers_per_node)
    useful = math.ceil(cfg.num_workers * trials / options.workers_per_node)
    least = options.nodes or (needed if cfg.is_elastic else useful)
    if least < needed:
        raise UserError(
            f"--nodes {least}: the recipe needs {cfg.min_workers} workers, {options.workers_per_node} on a node, and so "
            f"{needed} nodes; give as many, more --workers-per-node, or a smaller ray.num_workers"
        )
    most = options.max_nodes or (max(least, useful) if cfg.is_elastic else least)
    if most < least:
        raise UserError(f"--max-nodes {most}: is less than the {least} nodes that there are to begin with")
    return least, most


def _node(cfg: RunConfig, options: ManifestOptions) -> dict[str, float]:
    """What a node has: enough for its workers."""
    each, workers = dict(cfg.worker_resources() or {}), options.workers_per_node
    if unknown := sorted(each.keys() - {"CPU", "GPU", "memory"}):
        raise UserError(
            f"ray.resources_per_worker.{unknown[0]}: which nodes have it? a manifest knows CPU, GPU and memory; write it "
            "without, and add it to the file"
        )
    needed = math.ceil(each.get("CPU", 1) * workers)
    if options.cpus is not None and options.cpus < needed:
        raise UserError(
            f"--cpus {options.cpus}: the workers of a node need {needed}; give as many, or fewer --workers-per-node"
        )
    found: dict[str, float] = {"CPU": options.cpus or max(needed, LEAST_CPUS)}
    if gpus := math.ceil(_gpus_per_worker(cfg, each, options.gpu) * workers):
        found["GPU"] = gpus
    if memory := options.memory or math.ceil(each.get("memory", 0) * workers / GIB):
        found["memory"] = memory
    return found


def _gpus_per_worker(cfg: RunConfig, each: dict[str, float], wanted: bool | None) -> float:
    said = each.get("GPU") if "GPU" in each or cfg.ray.use_gpu == "auto" else float(cfg.ray.use_gpu)
    if said is None:
        return float(wanted is not False)
    if wanted is not None and wanted != (said > 0):
        flag = "--gpu" if wanted else "--no-gpu"
        raise UserError(
            f"{flag}: contradicts the recipe, whose workers have {said:g} GPUs each; change ray.use_gpu, or leave it out"
        )
    return said


def _name(options: ManifestOptions) -> str:
    """Of the command and the recipe, such that Kubernetes takes it."""
    stem = re.sub(r"[^a-z0-9]+", "-", Path(options.recipe).stem.lower())
    return f"{options.command}-{stem}"[:40].strip("-")
