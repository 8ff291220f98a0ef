"""Each patch of Ray has a test that fails when it is no longer needed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray._private.node
import ray._private.workers.setup_worker
from ray._private.parameter import RayParams

from cluster.ray_patches import WORKER_SETUP, lean_node
from cluster.worker_setup import worker_command


def test_rays_own_setup_still_imports_ray() -> None:
    """When this fails, see whether `cluster/worker_setup.py` can go."""
    source = inspect.getsource(ray._private.workers.setup_worker)
    assert "\nfrom ray._private.runtime_env.context import" in source


def test_ray_still_has_no_argument_for_it() -> None:
    """When this fails, say it to `ray.init`, and delete `lean_node`."""
    assert {"setup_worker_path", "include_log_monitor"}.isdisjoint(inspect.signature(ray.init).parameters)
    with lean_node(log_monitor=False):
        params = RayParams()
    assert (params.setup_worker_path, params.include_log_monitor) == (str(WORKER_SETUP), False)
    assert RayParams().setup_worker_path is None


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
