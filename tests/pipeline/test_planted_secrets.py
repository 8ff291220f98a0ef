"""No file that a command leaves holds a secret, wherever it came from."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.demo.cluster import start_cluster
from pipeline.secrets import REDACTED
from tests.pipeline.data.conftest import write_jsonl
from tests.s3 import Bucket
from tests.tiny import pairs

ROOT = Path(__file__).parents[2]
MARK = "p1anted-3f9a"
VARIABLES = (
    "AWS_SESSION_TOKEN_OF_OTHERS",
    "AZURE_STORAGE_CONNECTION_STRING",
    "GOOGLE_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "OPENAI_API_KEY",
    "RAY_AUTH_TOKEN",
    "TRACKIO_TOKEN",
    "WANDB_API_KEY",
)
"""That carry keys of services which a run may use."""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files, Ray's among them, whose path leaves room for its sockets."""
    with tempfile.TemporaryDirectory(prefix="p-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.driver
@pytest.mark.parametrize(
    ("command", "status"), [pytest.param("tune", 0, marks=pytest.mark.release), ("fail", 2), ("submit", 0)]
)
def test_no_file_holds_a_secret(command: str, status: int, s3: Bucket, tiny_base: str, tmp_path: Path, temporary: Path) -> None:
    """Secrets of the environment, and those in every place of a recipe that takes one; the job is `tune`."""
    planted = {name: f"{MARK}-{name.lower()}" for name in VARIABLES}
    for name in ("data", "project"):
        (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "data" / "a.jsonl", pairs(16))
    recipe: dict[str, Any] = {
        "base_model": tiny_base,
        "overrides_of_model_kwargs": {"token": f"{MARK}-token-of-recipe"},
        "datasets": [{"path": str(tmp_path / "data" / "a.jsonl")}],
        "val_set_size": 4,
        "sequence_len": 256,
        "max_steps": 2,
        "eval_steps": 1,
        "save_steps": 1,
        "logging_steps": 1,
        "micro_batch_size": 2,
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": s3.uri(f"{command}"),
        "wandb_mode": "offline",
        "wandb_project": "p",
    }
    if command != "fail":
        recipe["tune"] = {"space": {"learning_rate": {"grid": [1e-4]}}, "search": "grid", "baseline": False}
    else:
        recipe["learning_rate"] = 1e38
    if command == "submit":
        del recipe["overrides_of_model_kwargs"]  # the recipe itself lies on the node
    (tmp_path / "project" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment = {**os.environ, **s3.variables, **planted, **paths, "TMPDIR": str(temporary)}
    words = [{"fail": "train"}.get(command, command), "recipe.yaml"]
    with ExitStack() as stack:
        if command == "submit":
            environment["RAY_AUTH_MODE"] = "disabled"
            address = stack.enter_context(start_cluster(folder=temporary / "ray", environment=environment)).address
            words = ["submit", "tune", "recipe.yaml", "--follow", "--address", address, "--shared", str(tmp_path)]
            words += ["--shared", tiny_base]
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", *words],
            cwd=tmp_path / "project",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
    assert done.returncode == status, done.stderr
    secrets = (MARK.encode(), s3.variables["AWS_SECRET_ACCESS_KEY"].encode())
    written = [path for folder in (tmp_path, temporary) for path in folder.rglob("*") if path.is_file()]
    files = [path for path in written if path != tmp_path / "project" / "recipe.yaml"]
    content = {**{str(path): path.read_bytes() for path in files}, **{key: s3.content(key) for key in s3.objects()}}
    output = {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    found = {(name, secret) for name, text in {**content, **output}.items() for secret in secrets if secret in text}
    assert not found, [(name, content.get(name, output.get(name, b"")).split(secret)[0][-300:]) for name, secret in found]
    configs = [text for name, text in content.items() if name.endswith("config.yaml") and b"base_model" in text]
    assert configs and (command == "submit" or all(REDACTED.encode() in text for text in configs))
