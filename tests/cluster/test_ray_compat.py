"""Each entry of the compat module has a test that fails when it is no longer needed."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray._private.node
import ray._private.workers.setup_worker
import ray.data
import ray.runtime_env
import ray.util.state
from ray._private.parameter import RayParams
from ray.dashboard.modules import dashboard_sdk
from ray.experimental import internal_kv
from ray.scripts import scripts
from ray.tune import Callback, RunConfig, Tuner
from ray.tune.execution import class_cache
from ray.tune.execution.tune_controller import TuneController

from cluster.local_workers.worker_setup import worker_command
from cluster.ray_compat import (
    WORKER_SETUP,
    FewerCallbacks,
    dashboard_url,
    get_value,
    node_groups,
    own_interrupts,
    put_value,
    remove_orphaned_groups,
    running_jobs,
    skip_setup_worker,
    trials_without_keys,
    tune_controllers,
    unused_train_callbacks,
    without_deprecation,
)
from tests.waiting import wait_for


def test_rays_own_setup_still_imports_ray() -> None:
    """When this fails, see whether `cluster/local_workers/worker_setup.py` can go."""
    source = inspect.getsource(ray._private.workers.setup_worker)
    assert "\nfrom ray._private.runtime_env.context import" in source


def test_ray_still_has_no_argument_for_it() -> None:
    """When this fails, say it to `ray.init`, and delete `skip_setup_worker`."""
    assert {"setup_worker_path", "include_log_monitor"}.isdisjoint(inspect.signature(ray.init).parameters)
    with skip_setup_worker(log_monitor=False):
        params = RayParams()
    assert (params.setup_worker_path, params.include_log_monitor) == (str(WORKER_SETUP), False)
    assert RayParams().setup_worker_path is None


def test_tune_still_gives_keys_to_the_runtime_environment() -> None:
    """When this fails, delete `trials_without_keys`."""
    before = class_cache.ENV_VARS_TO_PROPAGATE
    assert "AWS_SECRET_ACCESS_KEY" in before
    with trials_without_keys():
        assert {name for name in before if "AWS" not in name} == class_cache.ENV_VARS_TO_PROPAGATE
    assert class_cache.ENV_VARS_TO_PROPAGATE is before


def test_ray_data_warns_of_an_option_that_it_has_no_parameter_for(ray_session: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert "max_retries" not in inspect.signature(ray.data.Dataset.flat_map).parameters
    rows = ray.data.range(1)
    rows.flat_map(lambda row: [row], max_retries=1)
    assert [one for one in recwarn if "ray_remote_args" in str(one.message)]
    recwarn.clear()
    with without_deprecation():
        rows.flat_map(lambda row: [row], max_retries=1)
    assert not [one for one in recwarn if "ray_remote_args" in str(one.message)]


def test_ray_init_still_waits_for_a_token_as_long_as_it_likes() -> None:
    """When this fails, delete `authenticated_channel`, and let `ray.init` say it."""
    assert not [name for name in inspect.signature(ray.init).parameters if "timeout" in name]


def test_the_job_client_still_sends_no_token_by_itself_and_waits_for_ever() -> None:
    """When this fails, see what of `job_client` can go."""
    source = inspect.getsource(dashboard_sdk)
    assert "maybe_enable_token_auth" not in source and "timeout" not in source


def test_ray_still_packs_without_a_list() -> None:
    """When this fails, let Ray list the files, and delete `walk_package`."""
    public = [name for name in dir(ray.runtime_env) if not name.startswith("_")]
    assert not [name for name in public if "pack" in name or "exclude" in name or "files" in name]


def test_the_autoscalers_groups_are_still_not_public(ray_session: Any) -> None:
    """When this fails, delete `node_groups`."""
    assert not [name for name in (*dir(ray.util.state), *dir(ray)) if "node_group" in name or "cluster_config" in name]
    assert node_groups() == []


def test_jobs_are_still_listed_by_a_dashboard_alone(ray_session: Any) -> None:
    """When this fails, delete `running_jobs`."""
    assert dashboard_url() is None
    address = ray.get_runtime_context().gcs_address  # not another Ray's of this machine
    with pytest.raises((ray.util.state.exception.RayStateApiException, ConnectionError)):
        ray.util.state.list_jobs(address=address, raise_on_missing_output=True, timeout=5)
    assert ray.get_runtime_context().get_job_id() in [job["JobID"] for job in running_jobs()]
    assert "dashboard_url" not in dir(ray.get_runtime_context())


def test_the_heads_memory_is_still_private(ray_session: Any) -> None:
    """When this fails, delete `put_value` and `get_value`."""
    assert not [name for name in dir(internal_kv) if name.startswith(("put", "get"))]
    assert put_value("a", {"b": 1}, b"tests") and get_value("a", b"tests") == {"b": 1}
    assert get_value("a", b"others") is None


def test_train_still_starts_what_no_run_uses() -> None:
    """When this fails, delete `unused_train_callbacks`."""
    from ray.train.torch import TorchTrainer

    assert not [name for name in inspect.signature(TorchTrainer).parameters if "callback" in name]
    started = {type(callback) for callback in TorchTrainer(print)._create_default_callbacks()}
    assert started >= set(unused_train_callbacks(has_dashboard=False)) > set(unused_train_callbacks(has_dashboard=True))

    class Trainer(FewerCallbacks, TorchTrainer):
        has_dashboard = staticmethod(lambda: False)

    assert {type(one) for one in Trainer(print)._create_default_callbacks()} == started - set(unused_train_callbacks(False))


def test_tunes_optuna_search_still_hides_its_trials() -> None:
    """When this fails, delete `optuna_trial`: the search has a public name for trials, or takes their attributes."""
    from ray.tune.search.optuna import OptunaSearch

    search = OptunaSearch({}, metric="loss", mode="min")
    assert search._ot_trials == {} and "ot_trials" not in dir(search)
    assert not [
        name for name in inspect.signature(search.on_trial_complete).parameters if "attr" in name or "constraint" in name
    ]


def test_ray_up_still_has_no_dry_run() -> None:
    """When this fails, let `ray up` check the file, and delete `check_autoscaler_config`."""
    assert not [option for option in scripts.up.params if "dry" in (option.name or "") or "check" in (option.name or "")]


def arguments(context: object, language: str = "PYTHON") -> list[str]:
    return ["work.py", "--a=1", f"--language={language}", f"--serialized-runtime-env-context={json.dumps(context)}", "b c"]


def test_a_worker_has_its_variables_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWN", "known")
    monkeypatch.setenv("OURS", "")
    context = {"env_vars": {"OURS": "${KNOWN}-${UNKNOWN}x"}, "py_executable": "python -S 'a b'", "command_prefix": []}
    assert worker_command(arguments(context)) == ["python", "-S", "a b", "work.py", "--a=1", "b c"]
    assert os.environ["OURS"] == "known-x"
    assert worker_command(arguments({})) == [sys.executable, "work.py", "--a=1", "b c"]


@pytest.mark.parametrize(
    "given", [arguments({"command_prefix": ["nice"]}), arguments({"java_jars": ["a"]}), arguments({}, "JAVA"), ["work.py"]]
)
def test_what_is_not_known_is_left_to_ray(given: list[str]) -> None:
    assert worker_command(given) is None


def test_a_prefix_is_run_by_ray(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text("import os, sys; print(os.environ['SAID'], sys.argv[1:])")
    context = {"command_prefix": ["SAID=yes"]}
    command = [sys.executable, str(WORKER_SETUP), *arguments(context)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "yes ['--a=1', 'b c']"


def test_groups_of_dead_actors_still_outlive_them(ray_session: Any) -> None:
    """When this fails, delete `remove_orphaned_groups`."""

    @ray.remote(num_cpus=0)
    class Creator:
        def create(self) -> Any:
            self.group = ray.util.placement_group([{"CPU": 1}])
            ray.get(self.group.ready())
            return self.group

    def state(group: Any) -> str:
        return str(ray.util.placement_group_table(group)["state"])

    own = ray.util.placement_group([{"CPU": 0.5}])
    creator = Creator.remote()
    group = ray.get(creator.create.remote())
    assert remove_orphaned_groups() == 1
    ray.kill(creator)
    wait_for(lambda: remove_orphaned_groups() == 0)
    wait_for(lambda: state(group) == "REMOVED")
    assert state(own) != "REMOVED"  # the driver's own
    ray.util.remove_placement_group(own)
    # Left alone, it stays: Ray would have noticed by now, as it did above.
    creator = Creator.remote()
    group = ray.get(creator.create.remote())
    ray.kill(creator)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(creator.create.remote())
    assert state(group) == "CREATED"
    wait_for(lambda: remove_orphaned_groups() == 0)


def test_tune_still_hides_its_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """When callbacks get it, delete `tune_controllers`; when `Tuner` can add trials, `add_trial`."""
    assert "controller" not in str(inspect.signature(Callback.setup)) + str(inspect.signature(Callback.on_step_end))
    assert not [name for name in dir(Tuner) if "add" in name or "stop" in name]
    calls: list[Any] = []
    monkeypatch.setattr(TuneController, "setup_experiments", lambda *arguments, **options: calls.append((arguments, options)))
    with tune_controllers(calls.append):
        TuneController.setup_experiments("controller", experiments=[], total_num_samples=3)  # type: ignore[arg-type]
    assert calls == ["controller", (("controller",), {"experiments": [], "total_num_samples": 3})]
    TuneController.setup_experiments("again")  # type: ignore[call-arg,arg-type]
    assert len(calls) == 3


def test_tune_still_leaves_its_handler_of_interrupts(ray_session: Any, tmp_path: Path) -> None:
    """When this fails, `own_interrupts` can go."""
    with own_interrupts():
        before = signal.getsignal(signal.SIGINT)
        with own_interrupts():
            Tuner(lambda config: {"loss": 1.0}, run_config=RunConfig(storage_path=str(tmp_path), verbose=0)).fit()
            assert signal.getsignal(signal.SIGINT) is not before
        assert signal.getsignal(signal.SIGINT) is before
