"""Which recipes no manifest can be written for: what the nodes wouldn't find or share, and what mustn't be in a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.manifests import Command, Kubernetes, Machines, Slurm
from pipeline.config.loading import parse_yaml
from pipeline.config.secrets import find_redacted, redact
from pipeline.errors import UserError
from pipeline.jobs.recipe_paths import named_paths
from pipeline.paths import OUTPUTS
from pipeline.security import refuse_remote_code
from pipeline.storage import is_uri

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["ManifestOptions", "refuse_unfit"]

CARRIES_RECIPE = ("kuberay", "slurm")
"""Manifests that the recipe is written into; runs on a `cluster` are submitted later, with the recipe and its files."""
SEES_FILES = ("cluster", "slurm")
"""Where a recipe's own files will be: brought by `prefray submit`, or in a home that Slurm's nodes share."""
MOUNT = "/mnt/shared"
"""Where a claim is mounted unless told otherwise."""


@dataclass(frozen=True)
class ManifestOptions:
    """What a person says beside the recipe."""

    target: str
    """A name of `MANIFESTS`."""
    recipe: str
    """Path of the recipe, for messages and names."""
    overrides: tuple[str, ...] = ()
    command: Command = "train"
    name: str | None = None
    resume: bool = False
    image: str | None = None
    mount: str | None = None
    workers_per_node: int = 1
    nodes: int | None = None
    max_nodes: int | None = None
    cpus: int | None = None
    """Of a node, as is `memory`."""
    memory: int | None = None
    """GiB."""
    gpu: bool | None = None
    """Whether a worker has a GPU, where the recipe leaves it to the cluster."""
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    machines: Machines = field(default_factory=Machines)
    slurm: Slurm = field(default_factory=Slurm)

    def mount_path(self) -> str | None:
        """Where the nodes' shared storage lies, where that is known.

        Raises:
            UserError: for a place without a claim, or one that is relative.
        """
        claim = self.kubernetes.claim
        if self.target == "kuberay" and self.mount is not None and claim is None:
            raise UserError(f"--mount {self.mount}: what is to be mounted there? name a PersistentVolumeClaim: --claim NAME")
        mount = self.mount or (MOUNT if claim is not None else None)
        if mount is not None and not mount.startswith("/"):
            raise UserError(f"--mount {mount}: must be an absolute path of the nodes, such as {MOUNT}")
        return mount


def refuse_unfit(cfg: RunConfig, recipe_text: str, options: ManifestOptions) -> None:
    """Refuse what can't run on nodes that are started for it, or mustn't be written into a file.

    Raises:
        UserError: saying what to do instead.
    """
    refuse_remote_code(options.recipe, cfg, options.overrides)
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
    if problems := [f"{key}: {message}" for key, message in _path_problems(cfg, options)]:
        raise UserError("\n".join(problems))


def _secrets(value: Any, path: str = "") -> Iterator[str]:
    """Paths of values that are secrets or hold some."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _secrets(item, f"{path}.{key}" if path else str(key))
    elif redact(value, next((part for part in reversed(path.split(".")) if not part.isdigit()), "")) != value:
        yield path


def _path_problems(cfg: RunConfig, options: ManifestOptions) -> Iterator[tuple[str, str]]:
    target, mount = options.target, options.mount_path()
    for key in OUTPUTS:
        if (problem := _output_problem(key, getattr(cfg, key), target, mount)) is not None:
            yield key, problem
    if target in SEES_FILES:
        return
    there = "the nodes won't have it; give a URI, a hub id, or a path " + (
        f"under {mount}" if mount else "on storage that they mount (--claim)"
    )
    for key, value in named_paths(cfg):
        path = Path(os.path.normpath(value))
        is_mounted = mount is not None and path.is_relative_to(mount)
        if not is_mounted and (value.startswith((".", "~")) or _exists(path)):
            yield key, f"{value!r} is a file or folder here, and {there}"


def _output_problem(key: str, where: str, target: str, mount: str | None) -> str | None:
    """Why the nodes couldn't share it, or None."""
    if is_uri(where) and not where.startswith("file://"):
        return None if key == "output_dir" else f"must be a folder that all nodes share, got the URI {where!r}"
    path = where.removeprefix("file://")
    uri = ", or a URI" if key == "output_dir" else ""
    place = f"under {mount}" if mount is not None else "on storage that all nodes share"
    if not path.startswith("/") and not (target == "slurm" and path.startswith("~")):
        return f"{where!r} is relative, and each node would have its own; give an absolute path {place}{uri}: --set {key}=..."
    if mount is not None and not Path(os.path.normpath(path)).is_relative_to(mount):
        return f"{where!r} isn't under {mount}, which is all that the nodes share; give a path there{uri}: --set {key}=..."
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # an inline template is longer than a name may be
        return False
