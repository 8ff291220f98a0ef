"""Ray's TorchTrainer with fewer callbacks, and torch's process group over several nodes, whose workers the driver knows.

On CPUs, gloo needs the network interface that connects the nodes.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer

from cluster.ray_compat import FewerCallbacks
from pipeline.ray.channel import NodeChannel
from pipeline.ray.session import has_dashboard
from pipeline.training.events import WorkerStarted

__all__ = ["ClusterTorchConfig", "ClusterTorchTrainer", "use_interface_of_cluster"]

VARIABLE = "GLOO_SOCKET_IFNAME"


class ClusterTorchTrainer(FewerCallbacks, TorchTrainer):
    """Ray's trainer without callbacks that runs don't need, whose actors take a second or more to start."""

    has_dashboard = staticmethod(has_dashboard)


@dataclass
class ClusterTorchConfig(TorchConfig):
    """Ray's config, for workers that may be on several nodes and that are announced to the driver."""

    channel: NodeChannel | None = None
    """The driver's, for its `WorkerStarted`."""

    @property
    def backend_cls(self) -> Any:
        """The backend, called by Ray when workers have started."""
        return _ClusterBackend


class _ClusterBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: ClusterTorchConfig) -> None:
        """Set gloo's interface on several nodes, before training; runs in Ray's controller."""
        # Before Ray's `on_start`, which creates the process group: gloo reads the variable then. On one node loopback works.
        if len(set(worker_group.execute(_node_address))) > 1:
            worker_group.execute(use_interface_of_cluster)
        super().on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: ClusterTorchConfig) -> None:
        """Announce the workers to the driver; runs in Ray's controller."""
        # Ray calls this for every attempt: after a restart the workers are other actors.
        super().on_training_start(worker_group, backend_config)
        if backend_config.channel is not None:
            for started in worker_group.execute(_worker_started):
                backend_config.channel.put(started)


def use_interface_of_cluster() -> None:
    """Let gloo use the interface with this node's address; by default it uses that of the host name, often loopback."""
    import psutil

    address = _node_address()
    for interface, entries in psutil.net_if_addrs().items():
        # IPv6 addresses of a link end with their interface: fe80::1%eth0.
        if any(entry.address.partition("%")[0] == address for entry in entries):
            # The user's own choice wins.
            os.environ.setdefault(VARIABLE, interface)


def _worker_started() -> WorkerStarted:
    """Return the event of this worker."""
    import ray
    import ray.train

    context, rank = ray.get_runtime_context(), ray.train.get_context().get_world_rank()
    return WorkerStarted(rank, context.current_actor, socket.gethostname(), context.get_node_id(), os.getpid())


def _node_address() -> str:
    import ray

    return ray.util.get_node_ip_address()
