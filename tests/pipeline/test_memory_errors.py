"""Want of memory: said as that, with how much there was, and which key lowers it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import dump_config
from pipeline.ray.actor_pool import StageInfo
from pipeline.ray.memory import out_of_memory
from tests.recipes import small_recipe
from tests.tiny import pairs

ROOT = Path(__file__).parents[2]
RAYS = """2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 6689a3) was \
15.37GB used / 16.00GB limit (0.960625)
OOM kill reason: Memory usage 8982818816B exceeded threshold"""
TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.11 GiB of which 1.06 GiB is free. Of"
CPUS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000"
)


@pytest.mark.parametrize(
    ("said", "means"),
    [
        (RAYS, "the node 10.0.0.2 ran out of memory: 15.37GB of 16.00GB were used"),
        (TORCHS, "GPU 1 ran out of memory: 2.00 GiB more were needed, and 1.06 GiB of 79.11 GiB were free"),
        (f"{CPUS} bytes. Error code 12", "a worker ran out of memory: 4.0 GB more were needed"),
        ("The actor died unexpectedly. Some common causes include the OOM killer", None),
    ],
)
def test_what_an_error_tells(said: str, means: str | None) -> None:
    assert out_of_memory(said) == means


def test_actors_say_what_lowers_it() -> None:
    error = StageInfo("scoring", "lower tokens_per_forward").failed(RAYS)
    assert str(error).endswith("16.00GB were used; lower tokens_per_forward")


@pytest.mark.driver
def test_prepare_gives_up(tiny_base: str, tmp_path: Path) -> None:
    """Ray's memory monitor is told that any use of memory is too much."""
    # So many that a task runs for seconds, and the monitor looks at it.
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(4000)))
    (tmp_path / "recipe.yaml").write_text(dump_config(small_recipe(tiny_base, tmp_path)(tmp_path / "run")))
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_task_oom_retries": "0", "RAY_memory_monitor_refresh_ms": "20"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **limits}
    command = [sys.executable, "-m", "pipeline", "prepare", "recipe.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("prefray: preparing the data failed: the node ") and "dataset_num_proc" in lines[-1]
    assert len(lines) < 6
