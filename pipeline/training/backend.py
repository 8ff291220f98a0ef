"""Ray's trainer as our runs want it, and torch's process group over several nodes.

On CPUs gloo has to be told by which interface nodes see each other.
"""

from __future__ import annotations

import os
from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipeline.session import has_dashboard

__all__ = ["ClusterTorchConfig", "ClusterTorchTrainer", "use_interface_of_cluster"]

VARIABLE = "GLOO_SOCKET_IFNAME"


class ClusterTorchTrainer(TorchTrainer):
    """Ray's, without the actors that are of no use to a run.

    Workers read their rows themselves, so there is no dataset to manage. What cleans up after a controller that has died asks a
    dashboard whether it has: without one of its own, that of any other Ray on this machine, which knows of no such controller.
    Each is a process that takes a second or more to start.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = (DatasetsCallback,) if has_dashboard() else (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]


class ClusterTorchConfig(TorchConfig):
    """Ray's, for workers that may be on several nodes."""

    @property
    def backend_cls(self) -> Any:
        """What Ray calls when workers have started."""
        return _ClusterBackend


class _ClusterBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Runs before workers start to train, in Ray's controller."""
        if len(set(worker_group.execute(_node_address))) > 1:
            worker_group.execute(use_interface_of_cluster)
        super().on_start(worker_group, backend_config)


def use_interface_of_cluster() -> None:
    """Let gloo take the interface with this node's address; by itself it takes that of the host's name, often loopback."""
    import psutil

    address = _node_address()
    for interface, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            os.environ.setdefault(VARIABLE, interface)


def _node_address() -> str:
    import ray

    return ray.util.get_node_ip_address()
