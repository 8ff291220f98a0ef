"""Real signals and a full disk: what was complete stays, and the run can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline import train
from pipeline.config import dump_config
from pipeline.errors import RunFailed
from pipeline.training.folder import RunFolder
from pipeline.training.metrics import MetricsFile
from strategies.checkpoints.manifest import find_damage
from tests.pipeline.training.test_train import Recorder

ROOT = Path(__file__).parents[3]
WAIT_S = 240


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def training_workers() -> list[psutil.Process]:
    """The training workers of this process's own Ray."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.is_running() and "RayTrainWorker" in child.name() + "".join(child.cmdline())]


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_changes_nothing_but_the_time(recipe: Any, tmp_path: Path) -> None:
    """SIGKILL in the middle: the run restarts from the checkpoint, and ends with the weights of a quiet run."""
    keys = {"num_epochs": 10, "eval_steps": 20, "save_steps": 8}
    quiet = train(recipe(tmp_path / "quiet", **keys))
    folder, display = RunFolder(tmp_path / "killed"), Recorder()

    def kill() -> None:
        wait_for(lambda: 8 in folder.checkpoints())
        training_workers()[1].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    killed = train(recipe(folder.path, **keys, ray={"num_workers": 2, "max_failures": 1}), display=display)
    killer.join()
    assert any("failed:" in note for note in display.notes)
    assert any(note.startswith("continuing from the checkpoint of step") for note in display.notes)
    steps = killed.history.dropna(subset=["loss"])["step"].tolist()
    assert steps == list(range(1, 41))
    mine, theirs = (load_file(result.model_dir / "model.safetensors") for result in (killed, quiet))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_leaves_the_last_complete_checkpoint(recipe: Any, small_disk: Path) -> None:
    """A checkpoint takes 1.3 MB here, so the fourth doesn't fit."""
    with pytest.raises(
        RunFailed, match="No space left on device.*the checkpoint of step . is complete, continue with --resume"
    ):
        train(recipe(small_disk / "run", save_steps=2, save_total_limit=10))
    folder = RunFolder(small_disk / "run")
    assert folder.checkpoints()
    assert find_damage(folder.path / f"checkpoint-{folder.checkpoints()[-1]:06d}") is None
    assert folder.finished_steps() is None


def test_ctrl_c_leaves_a_checkpoint_and_status_130(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """SIGINT to the whole foreground group, as a terminal sends it; afterwards --resume ends the run."""
    cfg = recipe(tmp_path / "run", num_epochs=50, eval_steps=50, save_steps=5)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(dump_config(cfg))
    command = [sys.executable, "-m", "pipeline", "train", str(recipe_file), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = RunFolder(Path(cfg.output_dir))
    wait_for(lambda: folder.checkpoints() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, errors
    assert "continue with --resume" in errors
    assert "Traceback" not in errors
    last = folder.checkpoints()[-1]
    display = Recorder()
    result = train(
        recipe(folder.path, num_epochs=4, eval_steps=50, save_steps=5) if last < 16 else cfg, resume=True, display=display
    )
    assert any(note == f"continuing from the checkpoint of step {last}" for note in display.notes)
    assert [record["step"] for record in MetricsFile(folder.metrics).read() if "loss" in record] == list(
        range(1, result.steps + 1)
    )
