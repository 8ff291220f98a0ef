"""Jobs on a cluster of several nodes that know nothing of this project: submitted, followed, hit by a lost node, stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.nodes import Cluster, cluster_of
from tests.tiny import pairs, save_tiny
from tests.waiting import wait_for

ROOT = Path(__file__).parents[3]
PACKAGES = ("cluster", "pipeline", "strategies")
JOB_WITHIN_S = 500


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of(workers=2) as started:
        yield started


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes share, with the model in it."""
    folder = tmp_path_factory.mktemp("storage")
    save_tiny(folder / "model")
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, storage: Path) -> Path:
    """What a person has: a recipe and data, in a folder of their own."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(48)))
    recipe = {
        "base_model": str(storage / "model"),
        "rl": "dpo",
        "datasets": [{"path": "pairs.jsonl"}],
        "val_set_size": 8,
        "dataset_prepared_path": str(storage / "prepared"),
        "output_dir": str(storage / "run"),
        "learning_rate": 1e-3,
        "micro_batch_size": 2,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "ray": {"num_workers": 2, "max_failures": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def prefray(cluster: Cluster, project: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command as a person outside the cluster does."""

    def start(*words: str, **variables: str | None) -> subprocess.Popen[str]:
        given = {**os.environ, "PYTHONPATH": str(ROOT), **cluster.environment, **variables}
        environment = {name: value for name, value in given.items() if value is not None}
        environment |= {"RAY_API_SERVER_ADDRESS": cluster.job_server}
        command = [sys.executable, "-m", "pipeline", *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=project, env=environment, text=True, **pipes)

    return start


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What a command prints up to a line with these words."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if words in line:
            return seen
    raise AssertionError(seen)


def finish(process: subprocess.Popen[str]) -> str:
    """The rest of what a command prints."""
    return process.communicate(timeout=JOB_WITHIN_S)[0]


def lose_a_node(cluster: Cluster) -> None:
    """A worker's node goes, and another one comes."""
    cluster.nodes[-1].kill()
    cluster.add_node()


def test_the_nodes_do_not_have_the_project(cluster: Cluster, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for code, status in (("import torch, ray, trl", 0), ("import pipeline", 1)):
        command = [str(cluster.python), "-c", code]
        assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == status, code


def test_a_request_without_the_token_is_refused(cluster: Cluster, prefray: Any) -> None:
    assert requests.get(f"{cluster.job_server}/api/jobs/", timeout=10).status_code == 401
    process = prefray("jobs", "list", RAY_AUTH_MODE="disabled")
    printed = finish(process)
    assert process.returncode == 2
    assert printed.count("\n") == 1 and "refuses requests without the cluster's token; set RAY_AUTH_MODE=token" in printed
    unsaid = prefray("jobs", "list", RAY_AUTH_MODE=None)
    assert "no jobs" in finish(unsaid) and unsaid.returncode == 0


@pytest.mark.release
def test_rays_own_command_trains(cluster: Cluster, project: Path, storage: Path, prefray: Any, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- python -m pipeline train RECIPE`, from a checkout with the recipe in it."""
    checkout, target = tmp_path / "checkout", storage / "by-ray"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in project.iterdir():
        (checkout / file.name).write_bytes(file.read_bytes())
    of_the_job = json.dumps({"env_vars": {"TQDM_DISABLE": "0"}})  # which the command itself sets elsewhere
    words = ["job", "submit", "--no-wait", "--submission-id=by-ray", "--working-dir=.", "--runtime-env-json", of_the_job]
    words += ["--", "python", "-m", "pipeline", "train", "recipe.yaml", "--set", f"output_dir={target}"]
    environment = {**os.environ, **cluster.environment, "RAY_ADDRESS": cluster.job_server}
    command = [sys.executable, "-m", "ray.scripts.scripts", *words]
    subprocess.run(command, cwd=checkout, env=environment, check=True, capture_output=True, timeout=300)
    follower = prefray("jobs", "logs", "by-ray", "--follow")
    seen = finish(follower)
    assert follower.returncode == 0 and "saved checkpoint-000008" in seen, seen
    assert (target / "model" / "model.safetensors").is_file()


def test_a_submitted_sweep_on_shared_storage_survives_a_node(
    cluster: Cluster, project: Path, storage: Path, prefray: Any
) -> None:
    """Its trials share the base of a host, whose workers are on both nodes, and whose driver is on a third one."""
    adapter = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "max_steps": 24}
    tune = {"space": {"learning_rate": {"grid": [1e-3, 1e-5]}}, "search": "grid", "baseline": False}
    recipe = yaml.safe_load((project / "recipe.yaml").read_text())
    (project / "sweep.yaml").write_text(
        yaml.safe_dump({**recipe, **adapter, "tune": tune, "output_dir": str(storage / "sweep")})
    )
    follower = prefray("submit", "tune", "sweep.yaml", "--shared", str(storage), "--id", "sweep", "--follow")
    first, second = (storage / "sweep" / "trials" / name for name in ("000", "001"))
    wait_for(lambda: all(list(one.glob("checkpoint-*")) for one in (first, second)) or follower.poll() is not None)
    assert follower.poll() is None
    lose_a_node(cluster)
    assert not (first / "model").exists() and not (second / "model").exists()
    seen = finish(follower)
    assert follower.returncode == 0, seen
    # Of the two, it was one's turn, or they computed together.
    turns = [
        seen.count(text) for text in ("(restart 1 of 2)", "; it was another run's turn", "; several runs computed together")
    ]
    assert turns in ([1, 1, 0], [0, 0, 2]), seen
    for trial in (first, second):
        assert (trial / "model" / "adapter_model.safetensors").is_file()
        steps = [json.loads(line)["step"] for line in (trial / "ledger.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 25))
    assert (storage / "sweep" / "best.yaml").exists() and not (storage / "sweep" / "hosts").exists()
    status = finish(prefray("jobs", "status", "sweep"))
    facts = dict(line.split(maxsplit=1) for line in status.replace("config fingerprint", "fingerprint").splitlines())
    assert facts["status"] == "succeeded" and facts["command"] == "tune" and len(facts["fingerprint"]) == 16


def test_a_run_goes_on_without_its_follower_and_saves_when_it_is_stopped(cluster: Cluster, storage: Path, prefray: Any) -> None:
    target = storage / "stopped"
    words = ("--set", f"output_dir={target}", "--set", "max_steps=100000", "--set", "save_steps=50000")
    follower = prefray("submit", "train", "recipe.yaml", "--shared", str(storage), "--id", "long", "--follow", *words)
    seen = read_until(follower, "step 2/100000")
    follower.send_signal(signal.SIGINT)
    seen += finish(follower)
    assert follower.returncode == 130, seen
    assert "the job goes on: `prefray jobs logs long --follow" in seen
    assert "running" in finish(prefray("jobs", "status", "long"))
    stop = prefray("jobs", "stop", "long")
    assert "job long was stopped" in finish(stop) and stop.returncode == 0
    again = prefray("jobs", "logs", "long", "--follow")
    seen = finish(again)
    assert "SIGTERM: saving after this step" in seen and again.returncode == 143
    twice = prefray("submit", "train", "recipe.yaml", "--shared", str(storage), "--id", "long")
    assert "has a job 'long' already; give another name" in finish(twice) and twice.returncode == 2
    assert json.loads((target / "run.json").read_text())["status"] == "started"
    assert [path.name for path in target.glob("checkpoint-*")] == re.findall(r"saved (checkpoint-\d+)", seen)


@pytest.mark.parametrize("command", ["doctor", pytest.param("train", marks=pytest.mark.release)])
def test_storage_that_is_not_shared_is_found_out(cluster: Cluster, storage: Path, prefray: Any, command: str) -> None:
    if not cluster.has_namespaces:
        pytest.skip("all nodes have the same files here")
    words = ["--shared", str(storage), "--set", f"output_dir={cluster.private / 'run'}"]
    if command == "doctor":
        process = prefray("doctor", "recipe.yaml", "--address", cluster.job_server, *words)
    else:
        process = prefray("submit", "train", "recipe.yaml", "--follow", *words)
    printed = finish(process)
    assert process.returncode == {"doctor": 1, "train": 2}[command], printed
    assert "isn't the same folder on every node" in printed
    if command == "doctor":
        table = {parts[2].strip(): parts[1].strip() for line in printed.splitlines() if len(parts := line.split("│")) > 3}
        assert table["output_dir"] == "fail"
        passed = ("cluster", "versions", "gloo interface", "dataset_prepared_path", "base_model", "datasets.0")
        assert {table[name] for name in passed} == {"pass"}
        assert "eth0 on " in printed and "3 nodes with 2 CPU" in printed


def test_what_the_cluster_lacks_is_said_before_anything_is_sent(cluster: Cluster, storage: Path, prefray: Any) -> None:
    start = time.monotonic()
    process = prefray("submit", "train", "recipe.yaml", "--shared", str(storage), "--set", "ray.num_workers=3", "--id", "large")
    printed = finish(process)
    assert process.returncode == 2 and time.monotonic() - start < 60
    assert "3 workers of 1 CPU each don't fit: the cluster has 2 CPU on 3 nodes" in printed
    missing = prefray("jobs", "status", "large")
    assert "has no job 'large'" in finish(missing) and missing.returncode == 2
