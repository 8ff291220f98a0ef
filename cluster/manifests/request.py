"""What a manifest is written from: a command, its recipe, and the nodes that it needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["IMAGE", "Command", "Kubernetes", "Machines", "ManifestRequest", "Slurm"]

Command = Literal["train", "tune"]
IMAGE = re.compile(r"[\w][\w.:/@-]*")
"""How an image's name looks."""


@dataclass(frozen=True)
class Kubernetes:
    """What only Kubernetes asks for."""

    namespace: str | None = None
    """None for that of whoever applies the manifest."""
    claim: str | None = None
    """The PersistentVolumeClaim that all nodes mount at the request's `mount`."""
    secret: str | None = None
    """The Secret whose keys the nodes get as environment variables."""


@dataclass(frozen=True)
class Machines:
    """What only `ray up` asks for: whose machines, and which."""

    provider: str = "aws"
    region: str | None = None
    """Of Azure the location."""
    zone: str | None = None
    project: str | None = None
    """GCP's project id."""
    resource_group: str | None = None
    """Azure's."""
    head_type: str | None = None
    """Instance type; None for the provider's default."""
    worker_type: str | None = None
    machine_image: str | None = None
    """What the machines boot; None for Ray's default."""
    head_ip: str | None = None
    worker_ips: tuple[str, ...] = ()
    ssh_user: str = "ubuntu"
    ssh_private_key: str | None = None


@dataclass(frozen=True)
class Slurm:
    """What only Slurm asks for."""

    time: str = "24:00:00"
    """Limit of one stay on the nodes, as Slurm writes it; a run that isn't done by then goes on after another wait."""
    partition: str | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()
    """Lines of the script that make `python` and `ray` the right ones."""


@dataclass(frozen=True)
class ManifestRequest:
    """A command on nodes that are started for it."""

    name: str
    command: Command
    recipe_text: str
    """YAML, with every override applied."""
    output_dir: str
    min_nodes: int
    """Nodes that do the work, of a run that may grow so many at least."""
    max_nodes: int
    node: dict[str, float]
    """CPU and GPU of one of them, and `memory` in GiB where it's known."""
    resume: bool = False
    """Continue what `output_dir` holds."""
    sweep_file: str | None = None
    """A local file that is there once a sweep can be continued; of a run, or where it can't be looked at, None."""
    image: str | None = None
    mount: str | None = None
    """Where the storage lies that all nodes share."""
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    machines: Machines = field(default_factory=Machines)
    slurm: Slurm = field(default_factory=Slurm)

    @property
    def autoscales(self) -> bool:
        """Whether the number of nodes may change."""
        return self.min_nodes < self.max_nodes

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        return int(self.node.get("GPU", 0))

    def words(self, recipe: str, resume: bool) -> list[str]:
        """The command of a job, as it starts or as it goes on; a sweep goes on with the recipe in its folder."""
        start = ["python", "-m", "pipeline", self.command]
        if self.command == "tune" and resume:
            return [*start, "--resume", self.output_dir]
        return [*start, recipe, *(["--resume"] if resume else [])]
