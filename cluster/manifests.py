"""Files that start nodes for a recipe: a RayJob of KubeRay, a cluster of `ray up`, a script of Slurm's `sbatch`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count
from typing import Any, Literal

import yaml

from cluster.ray_compat import check_autoscaler_config
from cluster.templates import fill_script, fill_yaml

__all__ = ["MANIFESTS", "PROVIDERS", "Command", "ManifestOptions", "ManifestRequest", "check_cluster"]

Command = Literal["train", "tune"]
IMAGE = r"\w[\w.:/@-]*"
SLURM_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
FOLDERS_OF_THE_IMAGE = ("", "/home", "/home/ray", "/usr", "/opt", "/etc", "/tmp", "/dev")  # noqa: S108
CPU_NODE_GIB, GPU_GIB = 16, 64
"""Default memory of a Kubernetes node: without GPUs, and for each GPU."""
NOTICE_S = 600
"""Seconds before Slurm's time limit at which the run gets SIGTERM, and saves."""
PROVIDERS = {
    "aws": ("region", "worker_type"),
    "gcp": ("region", "zone", "project", "worker_type"),
    "azure": ("region", "resource_group", "worker_type"),
    "local": ("head_ip",),
}
"""Providers of `ray up`, each with its required options."""


KEYS = {"s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"}
"""Store -> its variables with keys, where keys are variables."""


@dataclass(frozen=True)
class ManifestOptions:
    """The options of `prefray manifest`, which describes them."""

    target: str
    """A name of `MANIFESTS`."""
    recipe: str
    overrides: Sequence[str] | None = None
    command: Command = "train"
    name: str | None = None
    resume: bool = False
    workers_per_node: int = 1
    nodes: int | None = None
    max_nodes: int | None = None
    cpus: int | None = None
    memory: int | None = None
    gpu: bool | None = None
    image: str | None = None
    mount: str | None = None
    # kuberay
    claim: str | None = None
    secret: str | None = None
    namespace: str | None = None
    # cluster
    provider: str = "aws"
    region: str | None = None
    zone: str | None = None
    project: str | None = None
    resource_group: str | None = None
    head_type: str | None = None
    worker_type: str | None = None
    machine_image: str | None = None
    head_ip: str | None = None
    worker_ip: Sequence[str] | None = None
    ssh_user: str = "ubuntu"
    ssh_key: str | None = None
    # slurm
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    setup: Sequence[str] | None = None


@dataclass(frozen=True)
class ManifestRequest:
    """A command on nodes that are started for it: the options, and the sizes that follow from the recipe."""

    options: ManifestOptions
    name: str
    recipe_text: str
    """YAML, with every override applied."""
    output_dir: str
    min_nodes: int
    max_nodes: int
    cpus: int
    """Of a node, as are `gpus` and `memory`."""
    gpus: int = 0
    memory: int | None = None
    """GiB, where known."""
    mount: str | None = None
    """Absolute path of the storage that all nodes share."""
    stores: str | None = None
    """Schemes of the object stores that the recipe names, as "s3, gs"; None without one."""
    shares_nothing: bool = False
    """Whether all that the recipe names is in stores and on the hub, so that nodes need no shared storage."""
    sweep_file: str | None = None
    """A local file that exists once a sweep can be resumed; None for a run, and for a sweep at a URI."""

    @property
    def autoscales(self) -> bool:
        """Whether the number of nodes may change."""
        return self.min_nodes < self.max_nodes

    def words(self, recipe: str, resume: bool) -> list[str]:
        """Return the command that starts or resumes; a sweep is resumed with the recipe in its folder."""
        start = ["python", "-m", "pipeline", self.options.command]
        if self.options.command == "tune" and resume:
            return [*start, "--resume", self.output_dir]
        return [*start, recipe, *(["--resume"] if resume else [])]

    def values(self) -> dict[str, Any]:
        """Return the values that every template may use."""
        return {
            **vars(self.options),
            **vars(self),
            "recipe_text": self.recipe_text.removesuffix("\n"),
            "autoscales": self.autoscales,
            "keys": KEYS.get(self.stores or "", "what the store's client reads"),
            "shm": None if self.memory is None else max(1, round(self.memory / 2)),
        }


def kuberay(request: ManifestRequest) -> str:
    """Write a ConfigMap with the recipe, and a RayJob.

    Raises:
        ValueError: for a name that Kubernetes or KubeRay doesn't accept, or without an image.
    """
    options = request.options
    # KubeRay appends to the name, and names of Kubernetes services may have 63 characters.
    rule = "KubeRay takes up to 47 lower-case letters, digits and dashes, a letter first, no dash last; got"
    _check("name", request.name, r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", rule)
    for option in ("namespace", "claim", "secret"):
        rule = "no name that Kubernetes takes (lower-case letters, digits, dashes, dots):"
        _check(option, getattr(options, option), r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", rule)
    if request.mount is not None and request.mount.rstrip("/") in FOLDERS_OF_THE_IMAGE:
        raise ValueError(f"--mount: {request.mount!r} would hide what the image has there; give another folder")
    if options.image is None or re.fullmatch(IMAGE, options.image) is None:
        raise ValueError("--image: which image do the nodes run? build one with the Dockerfile, push it, and give its name")
    # The template needs a number, also for a recipe that asks for no memory.
    sized = replace(request, memory=request.memory or request.gpus * GPU_GIB or CPU_NODE_GIB)
    values = {
        "kubectl": "kubectl" if options.namespace is None else f"kubectl -n {options.namespace}",
        "entrypoint": shlex.join(request.words("/etc/prefray/recipe.yaml", options.resume)),
        "ray_version": version("ray"),
        "needs_keys": request.stores is not None and options.secret is None,
    }
    return fill_yaml("kuberay.yaml", sized.values() | values)


def ray_up(request: ManifestRequest) -> str:
    """Write a cluster's YAML, validated by Ray.

    Raises:
        ValueError: for an unknown provider, a missing option, or a config that Ray refuses.
    """
    options, is_local = request.options, request.options.provider == "local"
    if options.provider not in PROVIDERS:
        raise ValueError(f"--provider: unknown: {options.provider!r}; known: {', '.join(PROVIDERS)}")
    _check("name", request.name, r"[A-Za-z][A-Za-z0-9-]*", "of a cluster: letters, digits and dashes; got")
    _check("image", options.image, IMAGE, "no name of an image:")
    _check_machines(request)
    values = {
        **{name: options.provider == name for name in PROVIDERS},
        "is_cloud": not is_local,
        "is_bare": is_local and options.image is None,
        "must_mount": not is_local and request.mount is not None,
        "again": " --resume" if options.resume else "",
        "env": " ".join(f"--env {name}" for name in KEYS.get(request.stores or "", "NAME").split(" and ")),
        "worker_ips": list(options.worker_ip or ()),
        "most_workers": len(options.worker_ip or ()) if is_local else request.max_nodes,
    }
    if options.provider == "azure" and options.machine_image is not None:
        names, parts = ("publisher", "offer", "sku", "version"), options.machine_image.split(":")
        if len(parts) != len(names):
            raise ValueError(
                f"--machine-image: Azure's have four parts, PUBLISHER:OFFER:SKU:VERSION; got {options.machine_image!r}"
            )
        values |= dict(zip(names, parts, strict=True))
    text = fill_yaml("ray_up.yaml", request.values() | values)
    check_cluster(yaml.safe_load(text))
    return text


def _check_machines(request: ManifestRequest) -> None:
    options, provider = request.options, request.options.provider
    if missing := [f"--{name.replace('_', '-')}" for name in PROVIDERS[provider] if not getattr(options, name)]:
        raise ValueError(f"--provider {provider}: needs {', '.join(missing)} as well")
    have = 1 + len(options.worker_ip or ())
    if provider == "local" and have < request.min_nodes:
        raise ValueError(
            f"--worker-ip: the run needs {request.min_nodes} machines, and with the head there are {have}; name more, "
            "or say how many workers each of them has room for (--workers-per-node)"
        )
    if provider != "local" and options.image is None:
        raise ValueError(f"--image: which image do {provider}'s machines run? build one with the Dockerfile, and push it")
    if provider == "gcp" and request.gpus and options.machine_image is None:
        raise ValueError(
            f"--machine-image: what Ray boots on {provider} has no driver for GPUs; name an image with NVIDIA's driver "
            "and container toolkit"
        )


def check_cluster(config: dict[str, Any]) -> None:
    """Check a cluster's config as `ray up` does.

    Raises:
        ValueError: with Ray's message.
    """
    import jsonschema
    from click import ClickException

    try:
        check_autoscaler_config(config)
    except jsonschema.ValidationError as error:
        raise ValueError(f"Ray refuses the cluster: {error.json_path.removeprefix('$.')}: {error.message}") from error
    except (ClickException, RuntimeError, ValueError) as error:
        raise ValueError(f"Ray refuses the cluster: {error}") from error


def slurm(request: ManifestRequest) -> str:
    """Write a batch script: Ray on every node of an allocation, the run on the first, and a shutdown of all of it.

    `ray symmetric-run` does less: it forwards no SIGTERM to what it runs, so nothing could be saved; it exits with 0 when Ray
    couldn't be started; and its `ray stop` ends every other Ray of the user on those machines.

    Raises:
        ValueError: for a name or a time that Slurm doesn't accept, or too short a time.
    """
    options, lines = request.options, request.recipe_text.splitlines()
    rule = "of a job of Slurm's: letters, digits, dots, dashes and underscores; got"
    _check("name", request.name, r"[A-Za-z0-9._-]+", rule)
    # With less, the notice would come soon after the start: a job would save and be queued again, hardly trained.
    if _seconds(options.time) < 2 * NOTICE_S:
        raise ValueError(
            f"--time: {options.time} is too short: {NOTICE_S // 60} minutes before its end the run is told to save; "
            f"give at least {2 * NOTICE_S // 60} minutes"
        )
    for option in ("partition", "account"):
        rule = "names of Slurm's have letters, digits and -._@, with commas between them; got"
        _check(option, getattr(options, option), r"[\w.@-]+(,[\w.@-]+)*", rule)
    if any("\n" in line for line in options.setup or ()):
        raise ValueError("--setup: is one line; give the option once for each")
    values = {
        "allocation": f"{request.min_nodes}-{request.max_nodes}" if request.autoscales else request.min_nodes,
        "notice": NOTICE_S,
        "setup": "\n".join(options.setup or ()),
        # A line of the recipe that equals the here-document's end would end it there.
        "end": next(end for length in count() if (end := "RECIPE" + "_" * length) not in lines),
        "start": _shell_words(request, options.resume),
        "again": _shell_words(request, resume=True),
        "sweep_file": shlex.quote(request.sweep_file or ""),
    }
    return fill_script("slurm.sh", request.values() | values)


def _seconds(time: str) -> int:
    """Read a time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes and so on."""
    match = SLURM_TIME.fullmatch(time)
    if match is None:
        raise ValueError(f"--time: not as Slurm writes a time, such as 24:00:00 or 2-12:00:00: {time!r}")
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, seconds = [*parts, 0, 0][:3]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _shell_words(request: ManifestRequest, resume: bool) -> str:
    recipe = '"$work/recipe.yaml"'
    # The only word that the shell must expand.
    return " ".join(word if word == recipe else shlex.quote(word) for word in request.words(recipe, resume))


def _check(option: str, value: str | None, pattern: str, rule: str) -> None:
    if value is not None and re.fullmatch(pattern, value) is None:
        raise ValueError(f"--{option}: {rule} {value!r}")


MANIFESTS: dict[str, Callable[[ManifestRequest], str]] = {"kuberay": kuberay, "cluster": ray_up, "slurm": slurm}
"""Name of a manifest -> its writer: for KubeRay's operator, `ray up`, and `sbatch`."""
