"""What manifests are rendered from in the tests: four recipes' needs."""

from __future__ import annotations

from typing import Any

from cluster.manifests import Kubernetes, Machines, ManifestRequest

__all__ = ["REQUESTS", "request_for"]

RECIPE = "base_model: org/model\nrl: dpo\nchat_template_jinja: |\n  {{ '$HOME `x` \"y\"' }}\n"


def request_for(**changes: Any) -> ManifestRequest:
    """A request for one node with 4 CPUs, but for `changes`."""
    given: dict[str, Any] = {
        "name": "train-dpo",
        "command": "train",
        "recipe_text": RECIPE,
        "output_dir": "/mnt/shared/run",
        "min_nodes": 1,
        "max_nodes": 1,
        "node": {"CPU": 4},
        "image": "registry.example.org/prefray:1",
        "machines": Machines(region="us-west-2", worker_type="g6.4xlarge"),
    }
    return ManifestRequest(**{**given, **changes})


SHARED: dict[str, Any] = {
    "mount": "/mnt/shared",
    "kubernetes": Kubernetes(namespace="research", claim="scratch", secret="hub"),
}
REQUESTS = {
    "one CPU worker": request_for(),
    "four GPU workers": request_for(min_nodes=4, max_nodes=4, node={"CPU": 8, "GPU": 1, "memory": 96}, **SHARED),
    "elastic": request_for(min_nodes=1, max_nodes=4, node={"CPU": 8, "GPU": 2}, **SHARED),
    "tune": request_for(name="tune-dpo", command="tune", min_nodes=2, max_nodes=2, sweep_file="/mnt/shared/run/sweep.json"),
}
