"""How Ray is started."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.addresses import why_unreachable
from pipeline.config import parse_config
from pipeline.errors import UserError
from pipeline.ray import session
from pipeline.ray.session import local_options
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]


NEEDED = ["torch", "transformers.trainer", "strategies.trainers.pair", "trl.trainer.dpo_trainer", "peft", "deepspeed"]
UNUSED = ["mlflow", "trackio", "tensorboard"]


def test_workers_start_with_what_they_need_imported(ray_session: Any) -> None:
    @ray_session.remote(num_cpus=0)
    def imported() -> list[str]:
        import sys

        return [name for name in (*NEEDED, *UNUSED) if name in sys.modules]

    assert ray_session.get(imported.remote()) == NEEDED


def test_a_worker_computes_with_the_threads_of_its_cpus(ray_session: Any) -> None:
    """Ray says how many they are after the worker was forked, with torch loaded."""

    @ray_session.remote(num_cpus=1)
    class Worker:
        def threads(self) -> tuple[int, str | None]:
            import os

            import torch

            from pipeline.ray.session import use_own_threads

            torch.set_num_threads(3)
            use_own_threads()
            return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")

    threads, said = ray_session.get(Worker.remote().threads.remote())
    assert str(threads) == said


def test_no_other_ray_is_asked_whether_a_controller_is_alive(ray_session: Any) -> None:
    """Ray Train's cleaner asks any dashboard of this machine, and removes the placement group of a run that it doesn't know."""
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    from pipeline.training.torch_backend import ClusterTorchTrainer

    def cleaners() -> list[Any]:
        callbacks = ClusterTorchTrainer(print)._create_default_callbacks()
        return [one for one in callbacks if isinstance(one, PlacementGroupCleanerCallback)]

    assert not session.has_dashboard() and not cleaners()
    assert not ray_session.get(ray_session.remote(num_cpus=0)(session.has_dashboard).remote())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterTorchTrainer, "has_dashboard", staticmethod(lambda: True))
        assert len(cleaners()) == 1


SOON_S = 60
"""For a busy machine: where nobody looks first, Ray itself tries for minutes."""


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "ray.address: no Ray cluster answers at '127.0.0.1:1': Connection refused"),
        ("no-such-host.invalid:6379", "ray.address: no Ray cluster answers at 'no-such-host.invalid:6379': "),
        ("http://head:8265", "ray.address: 'http://head:8265' is a job server's; submit to it with `prefray submit"),
    ],
)
def test_an_address_where_no_cluster_is(address: str, message: str, tmp_path: Path) -> None:
    """In a process of its own, which hasn't joined a cluster yet."""
    (tmp_path / "recipe.yaml").write_text("base_model: m\ndatasets: [{path: x.jsonl}]\n")
    words = ["score", "recipe.yaml", "--set", f"ray.address={address}", "--set", f"output_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "pipeline", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=SOON_S)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("prefray: ")]
    assert message in line


def test_drivers_start_without_models() -> None:
    """A message comes sooner than torch and what is built on it are imported."""
    modules = (
        "pipeline.training.driver, pipeline.reference.scoring, pipeline.reference.token_budget, pipeline.evaluation.evaluate"
    )
    code = f"import sys, {modules}; print(*sorted(sys.modules.keys() & {{'torch', 'transformers', 'peft', 'accelerate'}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RAY_ADDRESS": "ray://head:10001"}, "RAY_ADDRESS: 'ray://head:10001' is Ray Client's"),
        ({"RAY_ADDRESS": "head"}, "RAY_ADDRESS: 'head' is no address by which nodes join; give HOST:PORT"),
        ({"RAY_ADDRESS": "http://head:8265"}, "RAY_ADDRESS: 'http://head:8265' is a job server's"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "RAY_ADDRESS: no Ray cluster answers at '127.0.0.1:1'"),
        ({"RAY_TRAIN_V2_ENABLED": "0"}, "RAY_TRAIN_V2_ENABLED: is off"),
    ],
)
def test_a_variable_with_which_no_run_is_possible(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=re.escape(message)):
        session.init_ray()


@pytest.mark.parametrize("value", ["", "  ", "local"])
def test_a_blank_address_is_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []
    monkeypatch.setenv("RAY_ADDRESS", value)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(session, "_start", lambda options, attempts: started.append(options))
    session.init_ray()
    assert started[0]["address"] == "local"


def test_a_cluster_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own words for it, from ray._private.utils.check_version_info."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(
            "Version mismatch: The cluster was started with:\n    Ray: 2.49.0\n    Python: 3.12.1\nThis process ..."
        )

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr(session, "why_unreachable", lambda _: None)
    cfg = parse_config({"base_model": "m", "datasets": [{"path": "x"}], "ray": {"address": "head:6379"}})
    words = r"'head:6379' has other versions than this process: The cluster was started with: Ray: 2\.49"
    with pytest.raises(UserError, match=words):
        session.init_ray(cfg)


def test_a_jobs_own_variables_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray refuses a driver that says again what its job has said."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    outside = session._for_nodes(debug=False)
    assert [Path(folder).name for folder in outside["py_modules"]] == ["cluster", "pipeline", "strategies"]
    assert outside["env_vars"] == session.QUIET
    job = {"runtime_env": {"env_vars": {"TQDM_DISABLE": "0"}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    inside = session._for_nodes(debug=False)
    assert inside["env_vars"].keys() == session.QUIET.keys() - {"TQDM_DISABLE"} and "py_modules" not in inside
    assert session._for_nodes(debug=True) == {"env_vars": {}}
    assert session._for_nodes(debug=True, address="10.0.0.1:6379") == {"env_vars": {"RAY_ADDRESS": "10.0.0.1:6379"}}


def test_nodes_that_an_autoscaler_may_still_start(ray_session: Any) -> None:
    """The autoscaler tells the cluster what it may start; here the test does."""
    from ray.core.generated.autoscaler_pb2 import ClusterConfig

    def report(**groups: tuple[dict[str, int], int]) -> None:
        config = ClusterConfig()
        for name, (resources, most) in groups.items():
            group = config.node_group_configs.add(name=name, max_count=most)
            group.resources.update(resources)
        ray_session._private.worker.global_worker.gcs_client.report_cluster_config(config.SerializeToString())

    before = session.node_resources()
    assert session.potential_nodes() == [] and len(before) == 1
    try:
        report(head=({"CPU": 2}, 1), gpu=({"CPU": 8, "GPU": 1}, 3))
        assert session.potential_nodes() == [{"CPU": 8.0, "GPU": 1.0}] * 3  # the head is there
        assert session.node_resources() == before + session.potential_nodes()
        report(gpu=({"GPU": 1}, -1))
        assert len(session.potential_nodes()) == session.MANY
    finally:
        report()
    assert session.node_resources() == before


@pytest.fixture
def guarded_head(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster that asks for a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    folder = tempfile.mkdtemp(prefix="ray-")
    words = [
        "start",
        "--head",
        f"--port={port}",
        "--num-cpus=1",
        "--include-dashboard=false",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--block",
    ]
    command = [sys.executable, "-m", "ray.scripts.scripts", *words, f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(command, env={**os.environ, **given}, **pipes)
    try:
        wait_for(lambda: why_unreachable(f"127.0.0.1:{port}") is None)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.driver
def test_a_cluster_that_asks_for_a_token(guarded_head: str, tmp_path: Path) -> None:
    """Ray itself asks for half a minute, and says that it can't connect."""
    code = f"from cluster.addresses import why_refused; print(why_refused({guarded_head!r}))"

    def refused(**variables: str) -> str:
        environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout

    asks = "it asks for a token, and takes none that this process has: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN "
    assert refused(RAY_AUTH_MODE="disabled").startswith(asks)
    assert refused(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 32).startswith(asks)
    assert refused(RAY_AUTH_MODE="token").startswith("RAY_AUTH_MODE is token, and there is none: set ")
    assert refused(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32) == "None\n"


def test_sockets_have_short_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert "_temp_dir" not in local_options()
    monkeypatch.setenv("TMPDIR", "/scratch/" + "x" * 60)
    assert local_options()["_temp_dir"] == "/tmp/ray"
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "x" * 60)
    with pytest.raises(UserError, match="RAY_TMPDIR: the sockets' paths would be too long in '/scratch/x"):
        local_options()
