"""Ray's session: start it, or join a cluster; the nodes that it has."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.addresses import is_http, why_refused, why_unreachable
from cluster.config import ClusterKeys
from cluster.local_workers.fork_server import start as start_fork_server
from cluster.ray_compat import dashboard_url, node_groups, skip_setup_worker
from pipeline.errors import UserError
from pipeline.io.retry import waiting_for
from pipeline.io.storage import is_uri

__all__ = [
    "LOCAL",
    "alive_nodes",
    "check_environment",
    "init_ray",
    "has_dashboard",
    "local_options",
    "malformed",
    "node_resources",
    "our_packages",
    "potential_nodes",
    "set_intervals",
    "use_own_threads",
]

# Environment of workers: libraries read these variables when they are imported.
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
WORKERS_IMPORT = ("pyarrow.dataset", "datasets", "strategies.preload")
"""Modules whose import takes most of the time that a worker takes to start."""
LOCAL = {
    # On a node with few CPUs, Ray would warn of the dozens of small actors that runs start.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Processes that a run on one machine doesn't need: the machine isn't preempted, and Ray's metrics aren't collected.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray Train forwards one report per poll of its workers, and evaluations wait for that.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
"""Environment of a Ray that is started here."""
OOM_RETRIES = 3
"""Retries of a task whose process was killed for its memory. By Ray's default there is no limit."""
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""In bytes: the path of a socket may have 107."""
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "none://"}
"""Environment of workers of a Ray that is started here: they would find the dashboard of any other Ray on this machine."""
OURS = ("cluster", "pipeline", "strategies")
"""Our packages, which are uploaded to a cluster's nodes."""
JOINED = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):\d{1,5}")
"""Addresses by which nodes join a cluster: host and port."""
MANY = 1000
"""Number of nodes to assume for a node group without a limit."""
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel")
"""Device files of accelerators: their drivers don't survive a fork if a library has initialized them."""


def init_ray(cfg: ClusterKeys | None = None, debug: bool = False) -> None:
    """Join the cluster that `ray.address` or the environment names, or start Ray on this machine; idempotent.

    Outside a job, whose package contains them, our modules are uploaded to the cluster's nodes.

    Args:
        cfg: the run's config; None for the environment's cluster, or this machine.
        debug: show the output of Ray's workers.

    Raises:
        UserError: when there is no cluster at the address, or one of other versions of Ray or Python.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(OOM_RETRIES))  # Ray reads it on import
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return
    check_environment()
    key, address = _address(cfg)
    if address is None:
        # In this order, so that variables of the user win.
        os.environ.update({**LOCAL, **os.environ})
        options = local_options(debug)
    else:
        _check_address(key, address)
        options = {"address": address, "runtime_env": _for_nodes(debug, address)}
    # After `LOCAL`, whose shorter interval it leaves.
    set_intervals(cfg)
    options |= {"log_to_driver": debug, "logging_level": logging.INFO if debug else logging.ERROR}
    try:
        with nullcontext() if address is None else waiting_for(f"the cluster at {address}"):
            _start(options, attempts=3)
    except AuthenticationError as error:
        raise UserError("RAY_AUTH_MODE: is token, and there is none: give RAY_AUTH_TOKEN, or unset the variable") from error
    except ConnectionError as error:
        raise UserError(f"{key}: no Ray cluster answers at {address!r}: {error}") from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        versions = " ".join(str(error).split()).removeprefix("Version mismatch: ")
        raise UserError(f"{key}: {address!r} has other versions than this process: {versions}") from error
    if not debug:
        import ray.data  # configures its logger on import

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # failures are raised as exceptions


def _address(cfg: ClusterKeys | None) -> tuple[str, str | None]:
    """Return the key or variable that names a cluster, and its address; None for this machine."""
    if cfg is not None and cfg.ray.address:
        key, address = "ray.address", cfg.ray.address
    else:
        key, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "").strip()
    return key, None if address in ("", "local") else address


def _check_address(key: str, address: str) -> None:
    """Raise UserError for an address where no cluster can be joined; Ray itself would retry for minutes."""
    if (problem := malformed(address)) is not None:
        raise UserError(f"{key}: {address!r} {problem}")
    if is_http(address):
        raise UserError(
            f"{key}: {address!r} is a job server's; submit to it with `prefray submit ... --address {address}`, or give "
            "the address by which nodes join, such as HEAD:6379"
        )
    if (problem := why_unreachable(address)) is not None:
        raise UserError(f"{key}: no Ray cluster answers at {address!r}: {problem}")
    if address != "auto" and (problem := why_refused(address)) is not None:
        raise UserError(f"{key}: the cluster at {address!r} can't be joined: {problem}")


def check_environment() -> None:
    """Raise UserError for environment variables with which no run is possible."""
    if os.environ.get("RAY_TRAIN_V2_ENABLED", "1").strip().lower() in ("0", "false"):
        raise UserError("RAY_TRAIN_V2_ENABLED: is off, and runs need Ray Train's version 2; unset the variable")


def malformed(address: str) -> str | None:
    """Return what is wrong with an address to join, as the rest of a sentence; None for a well-formed one."""
    if address.startswith("ray://"):
        return "is Ray Client's, over which no run can be driven; give the address by which nodes join, such as HEAD:6379"
    if address == "auto" or is_http(address) or JOINED.fullmatch(address):
        return None
    return "is no address by which nodes join; give HOST:PORT, such as HEAD:6379, or auto"


def _for_nodes(debug: bool, address: str | None = None) -> dict[str, Any]:
    """Return the runtime environment of a cluster's workers, without what the job's sets: Ray refuses duplicates."""
    environment = {} if debug else dict(QUIET)
    if address is not None and not is_uri(address) and address != "auto":
        environment["RAY_ADDRESS"] = address  # for Ray Train's cleaner, on a machine with two clusters
    # Set by Ray in the driver of a submitted job.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env")
    if job is None:
        return {"env_vars": environment, "py_modules": [str(folder) for folder in our_packages()]}
    existing = job.get("env_vars") or {}
    return {"env_vars": {name: value for name, value in environment.items() if name not in existing}}


def our_packages() -> list[Path]:
    """Return the folders of prefray's packages."""
    specs = [find_spec(name) for name in OURS]
    return [Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin is not None]


def set_intervals(cfg: ClusterKeys | None = None) -> None:
    """Set Ray Train's intervals in the environment, where it reads them when a run starts."""
    # It forwards one report per poll of its workers, every two seconds by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if cfg is not None and cfg.is_elastic:
        # A lost node is counted for a while: give up soon on workers that can't start, and count the nodes again.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")


def local_options(debug: bool = False) -> dict[str, Any]:
    """Return arguments of `ray.init` that start Ray on this machine, with the fork server where it works."""
    environment = {**({} if debug else QUIET), **NO_DASHBOARD}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if sys.platform == "linux" and not any(Path(device).exists() for device in DEVICES):
        runtime_env["py_executable"] = _worker_command(tuple(environment.items()))
    # "local": otherwise Ray would try to join a killed cluster that left its address file behind.
    return {"address": "local", "include_dashboard": False, "runtime_env": runtime_env, **_short_folder()}


def _short_folder() -> dict[str, str]:
    """Return the argument that moves Ray's sockets, if their paths would be too long in the temporary folder.

    Raises:
        UserError: for such a folder in RAY_TMPDIR.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")  # noqa: S108 - as Ray chooses it
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return {}
    if name == "RAY_TMPDIR":
        raise UserError(
            f"{name}: the sockets' paths would be too long in {folder!r}; give one of {LONGEST_FOLDER} bytes at most"
        )
    return {"_temp_dir": "/tmp/ray"}  # noqa: S108 - Ray's own default


@cache
def _worker_command(environment: tuple[tuple[str, str], ...]) -> str:
    """Start the fork server, once per environment, and return the command that starts workers."""
    return start_fork_server(WORKERS_IMPORT, {**os.environ, **dict(environment)})


def use_own_threads() -> None:
    """Let torch use as many threads as this worker has CPUs.

    Ray sets OMP_NUM_THREADS when it assigns a worker to a process; a forked one has imported torch before.
    """
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))


def _start(options: dict[str, Any], attempts: int) -> None:
    """Start Ray, with retries: on a busy machine its limit of 30 s can be too short."""
    import ray

    is_local = options["address"] == "local" and sys.platform == "linux"
    for attempt in range(1, attempts + 1):
        try:
            with skip_setup_worker(options["log_to_driver"]) if is_local else nullcontext():
                ray.init(**options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts:
                raise
            ray.shutdown()


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's descriptions of the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def node_resources() -> list[dict[str, float]]:
    """Return total resources of each node that is alive, or that the autoscaler may still start."""
    return [node["Resources"] for node in alive_nodes()] + potential_nodes()


def potential_nodes() -> list[dict[str, float]]:
    """Return resources of each node that the cluster's autoscaler may still start; empty without an autoscaler."""
    existing, nodes = alive_nodes(), []
    for group in node_groups():
        resources = {name: float(amount) for name, amount in group.resources.items()}
        alive = sum(_is_of_group(node["Resources"], resources) for node in existing)
        # A negative count means no limit.
        most = group.max_count if group.max_count >= 0 else MANY
        nodes += [resources] * max(0, min(most, MANY) - alive)
    return nodes


def _is_of_group(node: dict[str, float], group: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) == amount for name, amount in group.items() if name in ("CPU", "GPU"))


def has_dashboard() -> bool:
    """Return whether this process's cluster has a dashboard; workers of a local Ray have `NO_DASHBOARD` set."""
    return NO_DASHBOARD.items().isdisjoint(os.environ.items()) and dashboard_url() is not None
