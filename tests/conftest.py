"""Fixtures of every test: one Ray, one tiny model; and what holds the tests themselves."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runs import make_adapter_run, make_full_run
from tests.suite.hooks import *  # noqa: F403
from tests.suite.sharing import make_once

OF_THE_USER = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "AWS_", "HF_TOKEN", "MLFLOW_", "WANDB_")
"""Beginnings of variables that would take tests to somebody's cluster, store or account."""
for name in [name for name in os.environ if name.startswith(OF_THE_USER)]:
    del os.environ[name]
TRACKIO_DIR = Path(tempfile.mkdtemp(prefix="trackio-"))
"""Where trackio keeps its runs: it reads the variable once, and other libraries import it."""
atexit.register(shutil.rmtree, TRACKIO_DIR, ignore_errors=True)
os.environ.update(TRACKIO_DIR=str(TRACKIO_DIR), TRACKIO_STORAGE_MODE="sqlite")
NODE_CACHE = Path(tempfile.mkdtemp(prefix="prefray-cache-"))
"""Where the workers of these tests keep what they share."""
atexit.register(shutil.rmtree, NODE_CACHE, ignore_errors=True)
os.environ["PREFRAY_CACHE"] = str(NODE_CACHE)
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
# Ray's default, 15, leaves a worker 4 % of a core beside any busy process, as other tests are.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One small Ray, two CPUs, for all tests that need it."""
    import ray

    from pipeline.ray.session import LOCAL, _start, local_options

    os.environ.update({**LOCAL, **os.environ})
    options = {**local_options(), "num_cpus": 2, "log_to_driver": False, "object_store_memory": 200 << 20}
    _start(options, attempts=3)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def trackio_dir() -> Path:
    """trackio's folder."""
    return TRACKIO_DIR


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny model and its tokenizer."""
    from tests.tiny import save_tiny

    return str(make_once(tmp_path_factory, "tiny", save_tiny))


@pytest.fixture(scope="session")
def finished_adapter(ray_session: Any, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of an adapter, as `tests.runs.adapter_recipe` describes it; what changes it copies its folder."""
    return make_adapter_run(tmp_path_factory, tiny_base)


@pytest.fixture(scope="session")
def finished_full(ray_session: Any, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of all weights, 40 steps on two workers; what changes it copies its folder."""
    return make_full_run(tmp_path_factory, tiny_base)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference data beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real preference data beside the repository")
    return folder
