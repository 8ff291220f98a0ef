"""A cluster whose nodes share nothing but a bucket: every stage reads and writes there, and a lost node costs no bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from tests.nodes import Cluster, cluster_of
from tests.s3 import S3Server, s3_server
from tests.tiny import pairs, save_tiny

ROOT = Path(__file__).parents[3]
WEIGHTS = "model.safetensors"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_of(workers=2) as started:
        if not started.has_namespaces:
            pytest.skip("all nodes have the same files here")
        yield started


@pytest.fixture(scope="module")
def bucket(cluster: Cluster) -> Iterator[S3Server]:
    with s3_server(cluster.outside) as server:
        yield server


@pytest.fixture(scope="module")
def project(bucket: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe alone: model and data lie in the bucket."""
    folder, client = tmp_path_factory.mktemp("project"), boto3.client("s3")
    files = tmp_path_factory.mktemp("files")
    save_tiny(files / "model")
    (files / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs(48)))
    for file in (path for path in files.rglob("*") if path.is_file()):
        client.upload_file(str(file), bucket.name, str(file.relative_to(files)))
    recipe = {
        "base_model": bucket.uri("model"),
        "rl": "dpo",
        "datasets": [{"path": bucket.uri("pairs.jsonl")}],
        "val_set_size": 8,
        "dataset_prepared_path": bucket.uri("prepared"),
        "output_dir": bucket.uri("run"),
        "learning_rate": 1e-3,
        "micro_batch_size": 2,
        "max_steps": 32,  # many are left when a node is killed
        "logging_steps": 4,
        "save_steps": 4,
        "eval_steps": 16,
        "ray": {"num_workers": 2, "max_failures": 2},
        "tune": {"space": {"learning_rate": {"grid": [1e-3]}}, "search": "grid", "baseline": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def prefray(cluster: Cluster, project: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command outside the cluster, as a user with a home of their own."""

    def start(*words: str) -> subprocess.Popen[str]:
        home = project.parent / "home"
        environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT), "HOME": str(home)}
        environment |= {"RAY_API_SERVER_ADDRESS": cluster.job_server}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([sys.executable, "-m", "pipeline", *words], cwd=project, env=environment, text=True, **pipes)

    return start


@pytest.fixture(scope="module")
def submit(prefray: Any) -> Callable[..., subprocess.Popen[str]]:
    """Submit a command as a job and follow it."""
    keys = [word for name in KEYS for word in ("--env", name)]
    return lambda command, *words: prefray("submit", command, "recipe.yaml", "--follow", *keys, *words)


def finish(process: subprocess.Popen[str], until: str = "") -> str:
    """What a command prints, up to a line with these words, or to its end, which must be a success."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if until and until in line:
            return printed
    assert process.wait(timeout=60) == 0 and not until, printed
    return printed


def prepared_in(bucket: S3Server) -> set[str]:
    return {name for name in bucket.objects() if name.startswith("prepared/")}


def weights(bucket: S3Server, name: str) -> bytes:
    return bucket.content(f"{name}/model/{WEIGHTS}")


@pytest.mark.release
def test_every_stage_runs_through_the_bucket(
    cluster: Cluster, bucket: S3Server, project: Path, submit: Any, prefray: Any
) -> None:
    follower = submit("train", "--id", "train")  # which prepares and scores
    finish(follower, until="saved checkpoint-000004")
    cluster.nodes[-1].kill()
    cluster.add_node()
    assert "restarting from the checkpoint of step" in finish(follower)
    prepared = prepared_in(bucket)
    assert any(name.startswith("prepared/reference/") for name in prepared)

    finish(submit("tune", "--id", "tune", "--set", f"output_dir={bucket.uri('sweep')}"))
    # What another job prepared and scored was used as it is.
    assert prepared_in(bucket) == prepared
    # The trial has the recipe's values, and lost no node.
    assert weights(bucket, "run") == weights(bucket, "sweep/trials/000") != bucket.content(f"model/{WEIGHTS}")

    printed = finish(prefray("evaluate", bucket.uri("run"), "--answers", "0"))
    assert "reward" in printed
    # Nothing of a run was left on the user's machine but the cache of its node.
    assert not any(project.parent.joinpath(name).exists() for name in ("prepared", "run"))
