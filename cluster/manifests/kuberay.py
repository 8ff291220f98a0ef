"""A RayJob of KubeRay's operator: a cluster that is started for one job, and goes with it."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from typing import Any

import yaml

from cluster.manifests.request import IMAGE, ManifestRequest
from cluster.manifests.writing import documents, header

__all__ = ["render"]

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
FOLDERS_OF_THE_IMAGE = ("", "/home", "/home/ray", "/usr", "/opt", "/etc", "/tmp", "/dev")  # noqa: S108
LONGEST_NAME = 47
"""KubeRay appends to it, and the names of Kubernetes' services have 63 characters at most."""
RECIPE_DIR, RECIPE_FILE = "/etc/prefray", "recipe.yaml"
HEAD = {"CPU": 4.0, "memory": 16.0}
"""The driver reads and plans on the head, and trains nothing there."""
CPU_NODE_GIB, GPU_GIB = 16.0, 64.0
"""Memory of a node, where nobody has said it: without GPUs, and for each GPU."""
SHM_PART = 0.5
"""Of the memory, the most that /dev/shm may take: Ray's objects (30 % unless told otherwise), and NCCL's buffers."""
SHM = "/dev/shm"  # noqa: S108 - not a file of ours
IDLE_S, KEPT_S, STOP_WAIT_S = 300, 600, 600
"""Seconds: until an idle node goes, until a finished job's cluster goes, and for a stopped job to save a checkpoint."""
IMAGE_GROUP = 1000
"""Group of the image's user, who writes to the claim."""


def render(request: ManifestRequest) -> str:
    """A ConfigMap with the recipe, and a RayJob.

    Raises:
        ValueError: for a name that Kubernetes or KubeRay doesn't take, or for want of an image.
    """
    if not NAME.fullmatch(request.name) or len(request.name) > LONGEST_NAME:
        raise ValueError(
            f"--name: KubeRay takes up to {LONGEST_NAME} lower-case letters, digits and dashes, a letter first, no dash last; "
            f"got {request.name!r}"
        )
    kubernetes = request.kubernetes
    for option, value in (("namespace", kubernetes.namespace), ("claim", kubernetes.claim), ("secret", kubernetes.secret)):
        if value is not None and not LABEL.fullmatch(value):
            raise ValueError(f"--{option}: no name that Kubernetes takes (lower-case letters, digits, dashes, dots): {value!r}")
    if request.mount is not None and request.mount.rstrip("/") in FOLDERS_OF_THE_IMAGE:
        raise ValueError(f"--mount: {request.mount!r} would hide what the image has there; give another folder")
    if request.image is None or IMAGE.fullmatch(request.image) is None:
        raise ValueError("--image: which image do the nodes run? build one with the Dockerfile, push it, and give its name")
    kubectl = "kubectl" if request.kubernetes.namespace is None else f"kubectl -n {request.kubernetes.namespace}"
    comments = header(
        f"Start:  {kubectl} apply -f FILE",
        f"Follow: {kubectl} logs -f job/{request.name}    (once the cluster is up: {kubectl} get rayjob {request.name})",
        f"End:    {kubectl} delete rayjob {request.name}",
        "The nodes are sized for the recipe: GPUs, CPUs and memory of a worker stand at the end.",
    )
    return comments + documents(_recipe(request), _ray_job(request))


def _metadata(request: ManifestRequest, name: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "labels": {"app.kubernetes.io/name": "prefray"}}
    if request.kubernetes.namespace is not None:
        found["namespace"] = request.kubernetes.namespace
    return found


def _recipe_name(request: ManifestRequest) -> str:
    return f"{request.name}-recipe"


def _recipe(request: ManifestRequest) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(request, _recipe_name(request)),
        "data": {RECIPE_FILE: request.recipe_text},
    }


def _ray_job(request: ManifestRequest) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(request, request.name),
        "spec": {
            "submissionMode": "K8sJobMode",
            "entrypoint": shlex.join(request.words(f"{RECIPE_DIR}/{RECIPE_FILE}", request.resume)),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}),
            # Another try would be another cluster, and the run refuses an output_dir that holds one unless told to go on.
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            "rayClusterSpec": _cluster(request),
        },
    }


def _cluster(request: ManifestRequest) -> dict[str, Any]:
    spec: dict[str, Any] = {"rayVersion": version("ray"), "authOptions": {"mode": "token"}}
    if request.autoscales:
        spec["enableInTreeAutoscaling"] = True
        spec["autoscalerOptions"] = {"version": "v2", "idleTimeoutSeconds": IDLE_S}
    spec["headGroupSpec"] = {
        "rayStartParams": {"num-cpus": "0"},
        "template": _pod(request, "ray-head", HEAD),
    }
    memory = request.node.get("memory", request.gpus * GPU_GIB or CPU_NODE_GIB)
    spec["workerGroupSpecs"] = [
        {
            "groupName": "workers",
            "replicas": request.min_nodes,
            "minReplicas": request.min_nodes,
            "maxReplicas": request.max_nodes,
            "rayStartParams": {},
            "template": _pod(request, "ray-worker", {**request.node, "memory": memory}),
        }
    ]
    return spec


def _pod(request: ManifestRequest, container: str, resources: dict[str, float]) -> dict[str, Any]:
    """A node; the head alone reads the recipe."""
    is_head = container == "ray-head"
    volumes = {"shm": (SHM, {"emptyDir": {"medium": "Memory", "sizeLimit": _gib(resources["memory"] * SHM_PART)}})}
    if request.kubernetes.claim is not None:
        assert request.mount is not None
        volumes["shared"] = (request.mount, {"persistentVolumeClaim": {"claimName": request.kubernetes.claim}})
    if is_head:
        volumes["recipe"] = (RECIPE_DIR, {"configMap": {"name": _recipe_name(request)}})
    amounts = _amounts(resources)
    main: dict[str, Any] = {"name": container, "image": request.image}
    if is_head:
        ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
        main["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    if request.kubernetes.secret is not None:
        main["envFrom"] = [{"secretRef": {"name": request.kubernetes.secret}}]
    main["resources"] = {"requests": amounts, "limits": amounts}
    main["volumeMounts"] = [{"name": name, "mountPath": path} for name, (path, _) in volumes.items()]
    spec: dict[str, Any] = {"restartPolicy": "Never"}  # the autoscaler's version 2 counts on it
    if request.kubernetes.claim is not None:
        spec["securityContext"] = {"fsGroup": IMAGE_GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    if "nvidia.com/gpu" in amounts:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    spec["containers"] = [main]
    spec["volumes"] = [{"name": name, **source} for name, (_, source) in volumes.items()]
    return {"spec": spec}


def _amounts(resources: dict[str, float]) -> dict[str, str]:
    found = {"cpu": f"{resources['CPU']:g}", "memory": _gib(resources["memory"])}
    if resources.get("GPU", 0) > 0:
        found["nvidia.com/gpu"] = f"{resources['GPU']:g}"
    return found


def _gib(amount: float) -> str:
    return f"{max(1, round(amount))}Gi"
