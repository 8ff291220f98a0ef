"""A cluster for `ray up`: machines of a cloud, or one's own, that runs are then submitted to."""

from __future__ import annotations

import copy
import re
from typing import Any

from cluster.manifests.providers import PROVIDERS, Provider
from cluster.manifests.request import IMAGE, ManifestRequest
from cluster.manifests.writing import documents, header

__all__ = ["render"]

HEAD_TYPE, WORKER_TYPE = "head", "worker"
PORT = 6379
NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")
IDLE_MINUTES = 10


def render(request: ManifestRequest) -> str:
    """The cluster's YAML, which Ray itself has checked.

    Raises:
        ValueError: for an unknown provider, for want of what it needs, or with what Ray refuses.
    """
    machines = request.machines
    if machines.provider not in PROVIDERS:
        raise ValueError(f"--provider: unknown: {machines.provider!r}; known: {', '.join(PROVIDERS)}")
    if not NAME.fullmatch(request.name):
        raise ValueError(f"--name: of a cluster: letters, digits and dashes; got {request.name!r}")
    if request.image is not None and not IMAGE.fullmatch(request.image):
        raise ValueError(f"--image: no name of an image: {request.image!r}")
    provider = PROVIDERS[machines.provider]
    provider.check(request)
    config: dict[str, Any] = {"cluster_name": request.name, "provider": provider.section(machines)}
    config["auth"] = {"ssh_user": machines.ssh_user}
    if machines.ssh_private_key is not None:
        config["auth"]["ssh_private_key"] = machines.ssh_private_key
    if request.image is not None:
        config["docker"] = _docker(request)
    config |= _local_nodes(request) if provider.is_local else _cloud_nodes(request, provider)
    config |= _commands()
    check(config)
    return _comments(request, provider) + documents(config)


def check(config: dict[str, Any]) -> None:
    """Have Ray look at a cluster's config, as `ray up` does.

    Raises:
        ValueError: with what Ray says.
    """
    import jsonschema
    from click import ClickException
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except jsonschema.ValidationError as error:
        raise ValueError(f"Ray refuses the cluster: {error.json_path.removeprefix('$.')}: {error.message}") from error
    except (ClickException, RuntimeError, ValueError) as error:
        raise ValueError(f"Ray refuses the cluster: {error}") from error


def _docker(request: ManifestRequest) -> dict[str, Any]:
    """Without a known memory Ray itself sizes /dev/shm by what it finds on the machine."""
    options = ["--ulimit nofile=65536:65536"]
    if "memory" in request.node:
        options.append(f"--shm-size={max(1, round(request.node['memory'] / 2))}g")
    if request.mount is not None:
        options.append(f"--volume {request.mount}:{request.mount}")
    return {"image": request.image, "container_name": "prefray", "pull_before_run": True, "run_options": options}


def _local_nodes(request: ManifestRequest) -> dict[str, Any]:
    """One's own machines are all in the cluster, and the head works too."""
    count = len(request.machines.worker_ips)
    return {"min_workers": count, "max_workers": count}


def _cloud_nodes(request: ManifestRequest, provider: Provider) -> dict[str, Any]:
    """A small head that does no work, and as many workers as the run needs."""
    machines = request.machines
    assert provider.head_type is not None and machines.worker_type is not None
    worker: dict[str, Any] = {
        "min_workers": request.min_nodes,
        "max_workers": request.max_nodes,
        "resources": {"CPU": int(request.node["CPU"]), **({"GPU": request.gpus} if request.gpus else {})},
        "node_config": provider.node_config(machines.worker_type, machines.machine_image),
    }
    head = {
        "max_workers": 0,
        "resources": {"CPU": 0},
        "node_config": provider.node_config(machines.head_type or provider.head_type, machines.machine_image),
    }
    return {
        "max_workers": request.max_nodes,
        "idle_timeout_minutes": IDLE_MINUTES,
        "available_node_types": {HEAD_TYPE: head, WORKER_TYPE: worker},
        "head_node_type": HEAD_TYPE,
    }


def _commands() -> dict[str, Any]:
    """The dashboard, where jobs are submitted, is for the head alone; `ray dashboard` makes a tunnel to it."""
    head = f"ray start --head --port={PORT} --autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1"
    return {
        "setup_commands": [],
        "head_start_ray_commands": ["ray stop", f"ulimit -n 65536; {head}"],
        "worker_start_ray_commands": ["ray stop", f"ulimit -n 65536; ray start --address=$RAY_HEAD_IP:{PORT}"],
    }


def _comments(request: ManifestRequest, provider: Provider) -> str:
    again = "--resume" if request.resume else ""
    lines = [
        "Start:  ray up FILE",
        "Reach:  ray dashboard FILE    keeps a tunnel open, http://127.0.0.1:8265",
        f"Run:    prefray submit {request.command} RECIPE {again}".rstrip(),
        "End:    ray down FILE",
        f"Whoever reaches the head's port {PORT} can run code on the cluster: leave it closed to others,",
        "or start Ray with RAY_AUTH_MODE=token everywhere (`ray get-auth-token --generate`, and file_mounts for the token).",
    ]
    if provider.is_local and request.image is None:
        lines.append(
            f"Without an image every machine needs Python, Ray and prefray's packages, found by {request.machines.ssh_user}."
        )
    if not provider.is_local and request.mount is not None:
        lines.append(f"The machines must mount the storage at {request.mount} themselves: add initialization_commands for it.")
    return header(*lines)
