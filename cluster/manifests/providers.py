"""Whose machines `ray up` starts, what each of them needs to know, and how it names a machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.manifests.request import Machines, ManifestRequest

__all__ = ["PROVIDERS", "Provider"]

DISK_GB = 256
"""Room for an image with CUDA, a model, and Ray's spilled objects."""


def _ray_defaults(provider: str) -> dict[str, Any]:
    """What Ray itself boots on the provider's machines, in its default head."""
    from ray.autoscaler._private.providers import _get_default_config

    config = _get_default_config({"type": provider})
    found: dict[str, Any] = copy.deepcopy(config["available_node_types"][config["head_node_type"]]["node_config"])
    return found


def _aws(instance: str, image: str | None) -> dict[str, Any]:
    config = {**_ray_defaults("aws"), "InstanceType": instance}
    config["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] = DISK_GB
    return config if image is None else {**config, "ImageId": image}


def _gcp(instance: str, image: str | None) -> dict[str, Any]:
    config = {**_ray_defaults("gcp"), "machineType": instance}
    disk = config["disks"][0]["initializeParams"]
    disk["diskSizeGb"] = DISK_GB
    if image is not None:
        disk["sourceImage"] = image
    # Machines with GPUs can't move while Google's hosts are maintained.
    return {**config, "scheduling": [{"onHostMaintenance": "TERMINATE"}]}


def _azure(instance: str, image: str | None) -> dict[str, Any]:
    config = _ray_defaults("azure")
    machine = config["azure_arm_parameters"]
    machine["vmSize"] = instance
    if image is not None:
        parts = image.split(":")
        if len(parts) != 4:
            raise ValueError(f"--machine-image: Azure's have four parts, PUBLISHER:OFFER:SKU:VERSION; got {image!r}")
        names = ("imagePublisher", "imageOffer", "imageSku", "imageVersion")
        machine |= dict(zip(names, parts, strict=True))
    return config


@dataclass(frozen=True)
class Provider:
    """Machines of one kind of owner."""

    name: str
    keys: dict[str, str]
    """Field of `Machines` -> key of Ray's `provider:` section."""
    needs: tuple[str, ...]
    """Fields of `Machines` that can't be left out."""
    head_type: str | None = None
    node_config: Callable[[str, str | None], dict[str, Any]] = _aws
    boots_gpus: bool = True
    """Whether what Ray boots by default has a driver for GPUs."""

    @property
    def is_local(self) -> bool:
        """Whether the machines are there already."""
        return self.head_type is None

    def section(self, machines: Machines) -> dict[str, Any]:
        """Ray's `provider:` section."""
        values = {key: getattr(machines, field) for field, key in self.keys.items()}
        given = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None}
        return {"type": self.name, **given}

    def check(self, request: ManifestRequest) -> None:
        """Refuse what lacks something.

        Raises:
            ValueError: naming the options.
        """
        machines = request.machines
        missing = [f"--{field.replace('_', '-').removesuffix('s')}" for field in self.needs if not getattr(machines, field)]
        if missing:
            raise ValueError(f"--provider {self.name}: needs {', '.join(missing)} as well")
        if self.is_local:
            have = 1 + len(machines.worker_ips)
            if have < request.min_nodes:
                raise ValueError(
                    f"--worker-ip: the run needs {request.min_nodes} machines, and with the head there are {have}; name more, "
                    "or say how many workers each of them has room for (--workers-per-node)"
                )
            return
        if request.image is None:
            raise ValueError(f"--image: which image do {self.name}'s machines run? build one with the Dockerfile, and push it")
        if request.gpus and machines.machine_image is None and not self.boots_gpus:
            raise ValueError(
                f"--machine-image: what Ray boots on {self.name} has no driver for GPUs; name an image with NVIDIA's driver "
                "and container toolkit"
            )


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("aws", {"region": "region", "zone": "availability_zone"}, ("region", "worker_type"), "m6i.2xlarge", _aws),
        Provider(
            "gcp",
            {"region": "region", "zone": "availability_zone", "project": "project_id"},
            ("region", "zone", "project", "worker_type"),
            "n2-standard-8",
            _gcp,
            boots_gpus=False,
        ),
        Provider(
            "azure",
            {"region": "location", "zone": "availability_zone", "resource_group": "resource_group"},
            ("region", "resource_group", "worker_type"),
            "Standard_D8s_v5",
            _azure,
        ),
        Provider("local", {"head_ip": "head_ip", "worker_ips": "worker_ips"}, ("head_ip",)),
    )
}
"""Providers of `ray up` by name."""
