"""Files that start nodes for a run: pure functions from a `ManifestRequest` to text, by the name of what reads it."""

from __future__ import annotations

from collections.abc import Callable

from cluster.manifests import kuberay, ray_up, slurm
from cluster.manifests.request import Command, Kubernetes, Machines, ManifestRequest, Slurm

__all__ = ["MANIFESTS", "Command", "Kubernetes", "Machines", "ManifestRequest", "Slurm"]

MANIFESTS: dict[str, Callable[[ManifestRequest], str]] = {
    "kuberay": kuberay.render,
    "cluster": ray_up.render,
    "slurm": slurm.render,
}
"""What is written for KubeRay's operator, for `ray up`, and for `sbatch`."""
