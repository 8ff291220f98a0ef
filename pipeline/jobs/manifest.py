"""Sizes of the nodes that are started for a recipe, and checks that it can run on them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.manifests import ManifestOptions, ManifestRequest
from pipeline.config.loading import apply_overrides, parse_yaml, read_yaml
from pipeline.config.paths import OUTPUTS, uris_of
from pipeline.config.trust import refuse_remote_code
from pipeline.errors import UserError
from pipeline.io.storage import is_uri, locate, without_scheme
from pipeline.jobs.recipe_paths import named_paths
from pipeline.secrets import find_redacted, redact
from pipeline.tuning.folder import SWEEP

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["recipe_with", "request_of"]

CARRIES_RECIPE = ("kuberay", "slurm")
"""Manifests that contain the recipe; runs on a `cluster` are submitted later, with the recipe and its files."""
SEES_FILES = ("cluster", "slurm")
"""Manifests whose nodes see a recipe's local files: uploaded by `prefray submit`, or in a home that Slurm's nodes share."""
NO_STORES = ("file", "hf", "http", "https", "pkg")
"""Schemes of what is on a disk or in public."""
MOUNT = "/mnt/shared"
"""Default of `--mount` with a claim."""
LEAST_CPUS = 4
"""Fewest CPUs of a node by default: preparing and loading data take some beside the workers'."""
GIB = 1 << 30


def recipe_with(options: ManifestOptions) -> str:
    """Return the recipe as YAML with its overrides applied.

    Raises:
        UserError: as `load_config`.
    """
    values = apply_overrides(read_yaml(Path(options.recipe)), tuple(options.overrides or ()))
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # Neither a YAML block nor a here-document keeps other line breaks (such as U+2028), so they are escaped.
    return text if len(text.splitlines()) == text.count("\n") else yaml.safe_dump(values, sort_keys=False)


def request_of(cfg: RunConfig, options: ManifestOptions) -> ManifestRequest:
    """Size the nodes for a recipe.

    Args:
        cfg: the recipe that `options` names, validated.
        options: of the command.

    Raises:
        UserError: for a recipe that can't run on such nodes, or has secrets, which mustn't be written into a file.
    """
    text, mount = recipe_with(options), _mount(options)
    shares_nothing, schemes = not any(_paths(cfg)), [uri.partition("://")[0] for uri in uris_of(cfg)]
    _refuse_unfit(cfg, text, mount, options)
    if mount is not None and shares_nothing:
        raise UserError(
            f"{'--mount' if options.claim is None else '--claim'}: all that the recipe names is at URIs and on the hub, so the "
            "nodes need no shared storage; leave it out"
        )
    stem = re.sub(r"[^a-z0-9]+", "-", Path(options.recipe).stem.lower())
    least, most = _nodes(cfg, options)
    cpus, gpus, memory = _node(cfg, options)
    return ManifestRequest(
        options,
        name=options.name or f"{options.command}-{stem}"[:40].strip("-"),
        recipe_text=text,
        output_dir=cfg.output_dir,
        min_nodes=least,
        max_nodes=most,
        cpus=cpus,
        gpus=gpus,
        memory=memory,
        mount=mount,
        stores=", ".join(dict.fromkeys(scheme for scheme in schemes if scheme not in NO_STORES)) or None,
        shares_nothing=shares_nothing,
        sweep_file=f"{locate(cfg.output_dir)}/{SWEEP}" if options.command == "tune" and not is_uri(cfg.output_dir) else None,
    )


def _nodes(cfg: RunConfig, options: ManifestOptions) -> tuple[int, int]:
    """Return the minimum and maximum number of nodes."""
    trials = (cfg.tune.max_concurrent_trials or 1) if options.command == "tune" and cfg.tune is not None else 1
    needed = math.ceil(cfg.min_workers / options.workers_per_node)
    # An elastic run can begin with its fewest workers; concurrent trials of a sweep each need their own.
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


def _node(cfg: RunConfig, options: ManifestOptions) -> tuple[int, int, int | None]:
    """Return CPUs, GPUs and GiB of a node, enough for its workers."""
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
    # None: the recipe leaves it open, and nodes have GPUs unless the command says --no-gpu.
    gpus = each.get("GPU") if "GPU" in each or cfg.ray.use_gpu == "auto" else float(cfg.ray.use_gpu)
    if gpus is None:
        gpus = float(options.gpu is not False)
    elif options.gpu is not None and options.gpu != (gpus > 0):
        flag = "--gpu" if options.gpu else "--no-gpu"
        raise UserError(
            f"{flag}: contradicts the recipe, whose workers have {gpus:g} GPUs each; change ray.use_gpu, or leave it out"
        )
    memory = options.memory or math.ceil(each.get("memory", 0) * workers / GIB) or None
    return options.cpus or max(needed, LEAST_CPUS), math.ceil(gpus * workers), memory


def _mount(options: ManifestOptions) -> str | None:
    """Return the path of the nodes' shared storage; None where it isn't known."""
    if options.target == "kuberay" and options.mount is not None and options.claim is None:
        raise UserError(f"--mount {options.mount}: what is to be mounted there? name a PersistentVolumeClaim: --claim NAME")
    mount = options.mount or (MOUNT if options.claim is not None else None)
    if mount is not None and not mount.startswith("/"):
        raise UserError(f"--mount {mount}: must be an absolute path of the nodes, such as {MOUNT}")
    return mount


def _refuse_unfit(cfg: RunConfig, recipe_text: str, mount: str | None, options: ManifestOptions) -> None:
    refuse_remote_code(options.recipe, cfg, options.overrides or ())
    if options.command == "tune" and cfg.tune is None:
        raise UserError(f"{options.recipe}: has no `tune:` section to search; write one, or leave --command tune out")
    if cfg.ray.address is not None:
        raise UserError(
            f"ray.address: {cfg.ray.address!r} is another cluster than the one that the manifest starts; remove it, "
            "or submit to that one: prefray submit"
        )
    if options.target in CARRIES_RECIPE:
        values = parse_yaml(recipe_text, options.recipe)
        if keys := [*_secrets(values), *(key for key, _ in find_redacted(values))]:
            raise UserError(
                f"{', '.join(keys)}: a secret, which would stand in the manifest for everyone who may read it; remove it from "
                "the recipe, and give it in the environment (on Kubernetes by a Secret: --secret NAME)"
            )
    outputs = [(key, _output_problem(key, getattr(cfg, key), mount, options)) for key in OUTPUTS]
    problems = [f"{key}: {problem}" for key, problem in outputs if problem is not None]
    if options.target not in SEES_FILES:
        problems += _missing_files(cfg, mount)
    if problems:
        raise UserError("\n".join(problems))


def _secrets(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of values that are secrets or hold some."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _secrets(item, f"{path}.{key}" if path else str(key))
    elif redact(value, next((part for part in reversed(path.split(".")) if not part.isdigit()), "")) != value:
        yield path


def _paths(cfg: RunConfig) -> Iterator[str]:
    """Yield every path in a recipe: what no other value can be, and what is there."""
    outputs = [path for key in OUTPUTS if not is_uri(path := without_scheme(getattr(cfg, key)))]
    yield from outputs
    yield from (value for _, value in named_paths(cfg) if value.startswith((".", "/", "~")) or _exists(Path(value)))


def _output_problem(key: str, location: str, mount: str | None, options: ManifestOptions) -> str | None:
    """Return why the nodes can't share an output, or None."""
    if is_uri(location) and not location.startswith("file://"):
        return None
    path = without_scheme(location)
    advice = f"under {mount}" if mount is not None else "on storage that all nodes share"
    if not path.startswith("/") and not (options.target == "slurm" and path.startswith("~")):
        each = f"{location!r} is relative, and each node would have its own"
        return f"{each}; give a URI, or an absolute path {advice}: --set {key}=..."
    if mount is not None and not Path(os.path.normpath(path)).is_relative_to(mount):
        return (
            f"{location!r} isn't under {mount}, which is all that the nodes share; give a path there, or a URI: --set {key}=..."
        )
    return None


def _missing_files(cfg: RunConfig, mount: str | None) -> Iterator[str]:
    advice = "the nodes won't have it; give a URI, a hub id, or a path " + (
        f"under {mount}" if mount else "on storage that they mount (--claim)"
    )
    for key, value in named_paths(cfg):
        # Not `resolve`: symbolic links of this machine mean nothing on the nodes.
        path = Path(os.path.normpath(value))
        is_mounted = mount is not None and path.is_relative_to(mount)
        if not is_mounted and (value.startswith((".", "~")) or _exists(path)):
            yield f"{key}: {value!r} is a file or folder here, and {advice}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # an inline template is longer than a file name may be
        return False
