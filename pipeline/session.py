"""Starting or joining Ray."""

from __future__ import annotations

import logging
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from cluster.fork_server import start as start_fork_server
from pipeline.errors import UserError

__all__ = ["LOCAL", "connect", "local_options", "node_resources", "set_intervals", "use_own_threads"]

# Of no use to a person who waits for a result; libraries read them when they are imported in a worker.
QUIET = {
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
WORKERS_IMPORT = (
    "pyarrow.dataset",
    "datasets",
    "transformers.trainer",
    "peft",
    "strategies.builder",
    "strategies.models",
    "strategies.sharding",
    "strategies.trainers",
)
"""What takes most of the time that a worker's process takes to start."""
LOCAL = {
    # Dozens of small actors are no reason to warn of; on a node with few CPUs Ray would.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Processes that a run on one machine starts for nobody: nobody takes it away, or watches Ray's own metrics.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray Train hands a report on once per look at its workers, and evaluations wait for that.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
"""Settings of a Ray that is started here."""
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel")
"""Files of GPUs and the like: their drivers don't outlive a fork, should a library have talked to them."""


def connect(cfg: Any = None, debug: bool = False) -> None:
    """Join the cluster that `ray.address` or the environment names, or start Ray on this machine; idempotent.

    Args:
        cfg: the run's config, or None for this machine.
        debug: let the output of Ray's workers through.

    Raises:
        UserError: when there is no cluster at the given address.
    """
    import ray

    if ray.is_initialized():
        return
    address = (cfg.ray.address if cfg is not None else None) or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"address": address, "runtime_env": {"env_vars": {} if debug else QUIET}}
    if address is None:
        os.environ.update({**LOCAL, **os.environ})
        options = local_options(debug)
    set_intervals(cfg)
    options |= {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    try:
        _start(options, attempts=3)
    except ConnectionError as error:
        raise UserError(f"ray.address: no Ray cluster answers at {address!r}: {error}") from error
    if not debug:
        import ray.data  # sets its own logger up when it is imported

        logging.getLogger("ray.data").setLevel(logging.ERROR)


def set_intervals(cfg: Any = None) -> None:
    """Say in the environment how often Ray Train looks after its workers; it reads that where a run is started."""
    # It hands a report on once per look, two seconds apart by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if cfg is not None and cfg.is_elastic:
        # A node that was lost is still counted for a while: give up soon on workers that can't start, and count again.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")


def local_options(debug: bool = False) -> dict[str, Any]:
    """Arguments of `ray.init` that start Ray on this machine, with workers that start fast."""
    environment = {} if debug else QUIET
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if sys.platform == "linux" and not any(Path(device).exists() for device in DEVICES):
        runtime_env["py_executable"] = _worker_command(tuple(environment.items()))
    # "local": an address file that a killed cluster left behind would be joined otherwise.
    return {"address": "local", "include_dashboard": False, "runtime_env": runtime_env}


@cache
def _worker_command(environment: tuple[tuple[str, str], ...]) -> str:
    """How a worker's process is started; one server serves all that this process starts."""
    return start_fork_server(WORKERS_IMPORT, {**os.environ, **dict(environment)})


def use_own_threads() -> None:
    """Let torch compute with as many threads as Ray has given this worker CPUs.

    Ray says it in the environment when it assigns a process its work; one that was forked has loaded torch before.
    """
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _start(options: dict[str, Any], attempts: int) -> None:
    """Start Ray; on a busy machine its own limit of 30 s can be too short, so try again."""
    import ray

    for attempt in range(1, attempts + 1):
        try:
            ray.init(**options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts:
                raise
            ray.shutdown()


def node_resources() -> list[dict[str, float]]:
    """Total resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
