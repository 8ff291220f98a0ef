"""Starting or joining Ray."""

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
from cluster.fork_server import start as start_fork_server
from cluster.ray_patches import lean_node
from pipeline.errors import UserError
from pipeline.patience import waiting_for
from pipeline.storage import is_uri

__all__ = [
    "LOCAL",
    "alive_nodes",
    "check_environment",
    "connect",
    "dashboard_url",
    "has_dashboard",
    "local_options",
    "malformed",
    "node_resources",
    "our_packages",
    "potential_nodes",
    "set_intervals",
    "use_own_threads",
]

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
WORKERS_IMPORT = ("pyarrow.dataset", "datasets", "strategies.preload")
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
OOM_RETRIES = 3
"""Of a task whose process was killed for want of memory. By Ray's own setting it is tried for ever."""
LONGEST_FOLDER = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes: the path of a socket has 107 at most."""
NO_DASHBOARD = {"RAY_API_SERVER_ADDRESS": "none://"}
"""For workers of a Ray that is started here: they would find the dashboard of any other Ray on this machine."""
OURS = ("cluster", "pipeline", "strategies")
"""Our packages, which a cluster's nodes needn't have."""
JOINED = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):\d{1,5}")
"""Host and port."""
MANY = 1000
"""Nodes that a group without a limit is counted as."""
DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel")
"""Files of GPUs and the like: their drivers don't outlive a fork, should a library have talked to them."""


def connect(cfg: Any = None, debug: bool = False) -> None:
    """Join the cluster that `ray.address` or the environment names, or start Ray on this machine; idempotent.

    Outside a job, whose package has them, our own modules are sent to the cluster's nodes.

    Args:
        cfg: the run's config, or None for this machine.
        debug: let the output of Ray's workers through.

    Raises:
        UserError: when there is no cluster at the given address, or one of other versions of Ray or Python.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(OOM_RETRIES))  # which Ray reads when it is imported
    import ray
    from ray.exceptions import AuthenticationError

    if ray.is_initialized():
        return
    check_environment()
    key, address = _given_address(cfg)
    if address is None:
        os.environ.update({**LOCAL, **os.environ})
        options = local_options(debug)
    else:
        _check_address(key, address)
        options = {"address": address, "runtime_env": _for_nodes(debug, address)}
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
        import ray.data  # sets its own logger up when it is imported

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails comes as an exception


def _given_address(cfg: Any) -> tuple[str, str | None]:
    """The key or variable that names a cluster, and its address; None for this machine."""
    if cfg is not None and cfg.ray.address:
        key, address = "ray.address", cfg.ray.address
    else:
        key, address = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "").strip()
    return key, None if address in ("", "local") else address


def _check_address(key: str, address: str) -> None:
    """Raises UserError for an address where no cluster can be joined; Ray itself tries for minutes."""
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
    """Raises UserError for a variable with which no run is possible."""
    if os.environ.get("RAY_TRAIN_V2_ENABLED", "1").strip().lower() in ("0", "false"):
        raise UserError("RAY_TRAIN_V2_ENABLED: is off, and runs need Ray Train's version 2; unset the variable")


def malformed(address: str) -> str | None:
    """What is wrong with an address to join, in words that follow it; None for one that may be right."""
    if address.startswith("ray://"):
        return "is Ray Client's, over which no run can be driven; give the address by which nodes join, such as HEAD:6379"
    if address == "auto" or is_http(address) or JOINED.fullmatch(address):
        return None
    return "is no address by which nodes join; give HOST:PORT, such as HEAD:6379, or auto"


def _for_nodes(debug: bool, address: str | None = None) -> dict[str, Any]:
    """The runtime environment of a cluster's workers; a job's own stands, and Ray refuses to be told anything twice."""
    environment = {} if debug else dict(QUIET)
    if address is not None and not is_uri(address) and address != "auto":
        environment["RAY_ADDRESS"] = address  # on a machine of two clusters, Ray Train's cleaner asks this one
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env")
    if job is None:
        return {"env_vars": environment, "py_modules": [str(folder) for folder in our_packages()]}
    told = job.get("env_vars") or {}
    return {"env_vars": {name: value for name, value in environment.items() if name not in told}}


def our_packages() -> list[Path]:
    """Folders of prefray's packages."""
    specs = [find_spec(name) for name in OURS]
    return [Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin is not None]


def set_intervals(cfg: Any = None) -> None:
    """Say in the environment how often Ray Train looks after its workers; it reads that where a run is started."""
    # It hands a report on once per look, two seconds apart by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if cfg is not None and cfg.is_elastic:
        # A node that was lost is still counted for a while: give up soon on workers that can't start, and count again.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")


def local_options(debug: bool = False) -> dict[str, Any]:
    """Arguments of `ray.init` that start Ray on this machine, with workers that start fast."""
    environment = {**({} if debug else QUIET), **NO_DASHBOARD}
    runtime_env: dict[str, Any] = {"env_vars": environment}
    if sys.platform == "linux" and not any(Path(device).exists() for device in DEVICES):
        runtime_env["py_executable"] = _worker_command(tuple(environment.items()))
    # "local": an address file that a killed cluster left behind would be joined otherwise.
    return {"address": "local", "include_dashboard": False, "runtime_env": runtime_env, **_short_folder()}


def _short_folder() -> dict[str, str]:
    """Where Ray puts its sockets, if their paths would be too long in the temporary folder.

    Raises:
        UserError: for such a folder that was chosen for Ray.
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

    is_lean = options["address"] == "local" and sys.platform == "linux"
    for attempt in range(1, attempts + 1):
        try:
            with lean_node(options["log_to_driver"]) if is_lean else nullcontext():
                ray.init(**options)
            return
        except Exception as error:
            if "timed out during startup" not in str(error) or attempt == attempts:
                raise
            ray.shutdown()


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes that are alive, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def node_resources() -> list[dict[str, float]]:
    """Total resources of each node that is alive, and of those that the autoscaler may still start."""
    return [node["Resources"] for node in alive_nodes()] + potential_nodes()


def potential_nodes() -> list[dict[str, float]]:
    """Resources of each node that the cluster's autoscaler may still start; none where there is no autoscaler."""
    # Ray Data asks the same way; there is no public one.
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = config.node_group_configs if config is not None else []
    there, nodes = alive_nodes(), []
    for group in groups:
        resources = {name: float(amount) for name, amount in group.resources.items()}
        alive = sum(_is_of_group(node["Resources"], resources) for node in there)
        most = group.max_count if group.max_count >= 0 else MANY
        nodes += [resources] * max(0, min(most, MANY) - alive)
    return nodes


def _is_of_group(node: dict[str, float], group: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) == amount for name, amount in group.items() if name in ("CPU", "GPU"))


def has_dashboard() -> bool:
    """Whether the cluster that this process belongs to has one; a worker is told so where there is none."""
    return NO_DASHBOARD.items().isdisjoint(os.environ.items()) and dashboard_url() is not None


def dashboard_url() -> str | None:
    """Where the dashboard of the cluster listens; None where there is none."""
    import ray

    return ray._private.worker.global_worker.node.address_info["webui_url"] or None
