"""All private names of Ray that this project uses, each with the reason; written for Ray 2.60.

Each entry has a test in `tests/cluster/test_ray_compat.py` that fails when it is no longer needed.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from cluster.environment import environment

__all__ = [
    "FewerCallbacks",
    "add_trial",
    "authenticated_channel",
    "check_autoscaler_config",
    "dashboard_url",
    "get_value",
    "job_client",
    "skip_setup_worker",
    "node_groups",
    "optuna_trial",
    "own_interrupts",
    "put_value",
    "remove_orphaned_groups",
    "running_jobs",
    "trials_without_keys",
    "tune_controllers",
    "unused_train_callbacks",
    "walk_package",
    "without_deprecation",
]

WORKER_SETUP = Path(__file__).parent / "local_workers" / "worker_setup.py"
CLIENT_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.authentication.authentication_token_setup",
)
"""Loggers of Ray's job client, some of which set their own level; no option silences them."""
SILENT = logging.Logger(__name__, logging.CRITICAL + 1)
"""For Ray's directory walk, which logs the ignore files that it reads, and errors of the visitor."""


@contextmanager
def skip_setup_worker(log_monitor: bool) -> Iterator[None]:
    """Start workers of a local Ray without Ray's `setup_worker.py`, so that each imports Ray once instead of twice.

    The raylet starts a worker with a runtime environment through that program, which imports Ray, then executes the worker,
    which imports it again. `ray.init` has no argument for it, nor for the log monitor.

    Args:
        log_monitor: whether workers' output is forwarded to the driver; if not, the process that does so isn't started.
    """
    from ray._private.parameter import RayParams

    original = RayParams.__init__

    @wraps(original)
    def with_defaults(self: Any, *arguments: Any, **options: Any) -> None:
        # Defaults only: options that `ray.init` passes stay.
        defaults = {"setup_worker_path": str(WORKER_SETUP), "include_log_monitor": log_monitor}
        original(self, *arguments, **{**defaults, **options})

    RayParams.__init__ = with_defaults
    try:
        yield
    finally:
        RayParams.__init__ = original


@contextmanager
def trials_without_keys() -> Iterator[None]:
    """Start Ray Tune's trials without S3's keys in their runtime environment, which Ray writes to its logs.

    Our trials get them from the trial's job. Tune has no argument for it.
    """
    from ray.tune.execution import class_cache

    original = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in original if not name.startswith("AWS_")}
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = original


@contextmanager
def tune_controllers(receive: Callable[[Any], None]) -> Iterator[None]:
    """Pass the controller of each `Tuner.fit` to `receive`, before its first step.

    Only the controller ends single trials, or adds trials to those of a search. Tune hands it to schedulers alone, wrapped.
    """
    from ray.tune.execution.tune_controller import TuneController

    original = TuneController.setup_experiments

    @wraps(original)
    def setup(self: Any, *arguments: Any, **options: Any) -> None:
        receive(self)
        original(self, *arguments, **options)

    TuneController.setup_experiments = setup
    try:
        yield
    finally:
        TuneController.setup_experiments = original


def add_trial(controller: Any, origin: Any, trial_id: str, config: dict[str, Any]) -> None:
    """Add a trial to a running `Tuner.fit`, whose searcher doesn't know it.

    Args:
        controller: of `tune_controllers`.
        origin: a trial, whose trainable, storage and failure limit the new one has.
        trial_id: its id.
        config: its config.
    """
    from ray.tune.experiment import Trial

    trial = Trial(
        origin.trainable_name,
        config=config,
        trial_id=trial_id,
        stopping_criterion=origin.stopping_criterion,
        checkpoint_config=origin.run_metadata.checkpoint_manager.checkpoint_config,
        export_formats=origin.export_formats,
        max_failures=origin.max_failures,
        storage=origin.storage,
    )
    controller.add_trial(trial)


@contextmanager
def without_deprecation() -> Iterator[None]:
    """Pass `max_retries` to Ray Data without its deprecation warning; it has no other parameter for it."""
    from ray.util.annotations import RayDeprecationWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        yield


def authenticated_channel(address: str) -> AbstractContextManager[Any]:
    """Open a gRPC channel to HOST:PORT with this process's token. Ray has no public client of the GCS but `ray.init`, which
    waits for half a minute where a token is missing."""
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address)


def job_client(address: str, timeout: tuple[float, float]) -> Any:
    """Return Ray's client of the job server at just this address, which sends this machine's token where one is wanted.

    By itself it waits for ever for a server that doesn't answer, prefers the environment's address, and sends a token only if
    RAY_AUTH_MODE says so, while Ray's drivers send the one that Ray writes to `~/.ray` when it is first started here.
    `request` sends what the client has no method for.

    Args:
        address: http://HOST:PORT.
        timeout: seconds to connect, and to wait for an answer; set `timeout` of the client to change it.
    """
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class JobClient(JobSubmissionClient):
        def __init__(self) -> None:
            self.timeout = timeout
            with environment({"RAY_API_SERVER_ADDRESS": address}):
                super().__init__(address)

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            connect, answer = self.timeout
            # All of a package must be sent within the first, so there is none: the server has answered before.
            limits = (connect if options.get("data") is None else None, answer)
            return super()._do_request(method, endpoint, **{"timeout": limits, **options})

        request = _do_request

    for name in CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobClient()
    except AuthenticationError:
        if "RAY_AUTH_MODE" in os.environ or not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
    return JobClient()


def walk_package(root: Path, patterns: Sequence[str], take: Callable[[Path], None]) -> None:
    """Visit the files that Ray packs of a working directory, by its own rules, for which it has no public function.

    Args:
        root: the working directory.
        patterns: gitignore patterns of files to exclude.
        take: called with each path.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    with_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, [_get_excludes(root, list(patterns))], take, with_gitignore, SILENT)


def node_groups() -> list[Any]:
    """Return the autoscaler's node groups, each with `resources` and `max_count`. Ray Data reads them the same way."""
    from ray._private.state import state

    config = state.get_cluster_config()
    return list(config.node_group_configs) if config is not None else []


def running_jobs() -> list[dict[str, Any]]:
    """Return the cluster's running drivers. `ray.util.state.list_jobs` needs a dashboard, which local runs don't have.

    Without those of Ray itself, such as its dashboard's agents.
    """
    from ray._private.state import jobs

    own = ("_ray_internal", "ray::")
    return [job for job in jobs() if not job["IsDead"] and not any(name in job["Entrypoint"] for name in own)]


def dashboard_url() -> str | None:
    """Return the URL of the cluster's dashboard, None without one. `ray.init` returns it only to the process that calls it."""
    import ray

    return ray._private.worker.global_worker.node.address_info["webui_url"] or None


def put_value(name: str, value: Any, space: bytes) -> bool:
    """Store a value in the memory of the cluster's head; return whether this process has joined one.

    An actor would be another process, and an object may be spilled to disk.
    """
    from ray.experimental.internal_kv import _internal_kv_initialized, _internal_kv_put

    if joined := bool(_internal_kv_initialized()):
        _internal_kv_put(name, json.dumps(value), overwrite=True, namespace=space)
    return joined


def get_value(name: str, space: bytes) -> Any:
    """Return the value that `put_value` has stored under a name; None without one."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    text = _internal_kv_get(name, namespace=space) if _internal_kv_initialized() else None
    return None if text is None else json.loads(text)


def unused_train_callbacks(has_dashboard: bool) -> tuple[type, ...]:
    """Return Ray Train's default callbacks that runs here don't need, each an actor; no argument disables them.

    Workers read their rows themselves, so there is no dataset to manage. The cleaner of a dead controller's placement groups
    asks a dashboard whether the controller is alive: without one of its own cluster, that of any other Ray on this machine,
    which knows of no such controller.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    return (DatasetsCallback,) if has_dashboard else (DatasetsCallback, PlacementGroupCleanerCallback)


class FewerCallbacks:
    """Base of a `TorchTrainer` without `unused_train_callbacks`, stated before it among the bases of a class."""

    has_dashboard: Callable[[], bool]

    def _create_default_callbacks(self) -> list[Any]:
        unused = unused_train_callbacks(self.has_dashboard())
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unused)]  # type: ignore[misc]


def remove_orphaned_groups() -> int:
    """Remove this job's placement groups whose creator, an actor, is dead; return how many of living actors there are.

    Ray frees a group only when its creator's job has ended too, so that the workers' resources of a killed controller stay
    taken; its public table has no creators. Ray Train's own cleaner needs a dashboard, and starts after the workers.
    """
    from ray import PlacementGroupID, get_runtime_context
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = get_runtime_context().get_job_id()
    living = 0
    for entry in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        of_actor = group.creator_actor_id.strip(b"\xff") and group.creator_job_id.hex() == job
        if not of_actor or group.is_detached or group.state == PlacementGroupTableData.REMOVED:
            continue
        # Ray doesn't mark a group that was requested just before its creator's end, and handled after it.
        if group.creator_actor_dead or state.actor_table(group.creator_actor_id.hex()).get("State", "DEAD") == "DEAD":
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
        else:
            living += 1
    return living


@contextmanager
def own_interrupts() -> Iterator[None]:
    """Put back what handles SIGINT: Tune leaves its own handler unless one came, and the next one would be lost in it."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def optuna_trial(search: Any, trial_id: str) -> Any:
    """Return Optuna's trial behind one of Tune's, which takes violations; `OptunaSearch` passes on only metrics."""
    return search._ot_trials[trial_id]


def check_autoscaler_config(config: dict[str, Any]) -> None:
    """Check a config for `ray up`, which has no dry run.

    Raises:
        jsonschema.ValidationError, click.ClickException, RuntimeError, ValueError: whatever Ray raises.
    """
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))
