"""What manifests are rendered from in the tests: four recipes' needs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from cluster.manifests import ManifestOptions, ManifestRequest

__all__ = ["RECIPE", "REQUESTS", "request_for"]

RECIPE = "base_model: org/model\nrl: dpo\nchat_template_jinja: |\n  {{ '$HOME `x` \"y\"' }}\n"
OF_THE_REQUEST = {field.name for field in fields(ManifestRequest)}


def request_for(**changes: Any) -> ManifestRequest:
    """A request for one node with 4 CPUs on AWS, but for `changes`, which are options or what a recipe makes of them."""
    given: dict[str, Any] = {
        "name": "train-dpo",
        "recipe_text": RECIPE,
        "output_dir": "/mnt/shared/run",
        "min_nodes": 1,
        "max_nodes": 1,
        "cpus": 4,
        "image": "registry.example.org/prefray:1",
        **({} if "provider" in changes else {"region": "us-west-2", "worker_type": "g6.4xlarge"}),
        **changes,
    }
    options = {name: value for name, value in given.items() if name not in OF_THE_REQUEST}
    resolved = {name: value for name, value in given.items() if name in OF_THE_REQUEST}
    return ManifestRequest(ManifestOptions("kuberay", "dpo.yaml", **options), **resolved)


SHARED: dict[str, Any] = {"mount": "/mnt/shared", "namespace": "research", "claim": "scratch", "secret": "hub"}
NEEDS: dict[str, dict[str, Any]] = {
    "one CPU worker": {},
    "four GPU workers": {"min_nodes": 4, "max_nodes": 4, "cpus": 8, "gpus": 1, "memory": 96, **SHARED},
    "elastic": {"min_nodes": 1, "max_nodes": 4, "cpus": 8, "gpus": 2, **SHARED},
    "tune": {
        "name": "tune-dpo",
        "command": "tune",
        "min_nodes": 2,
        "max_nodes": 2,
        "sweep_file": "/mnt/shared/run/sweep.json",
    },
}
REQUESTS = {name: request_for(**needs) for name, needs in NEEDS.items()}
