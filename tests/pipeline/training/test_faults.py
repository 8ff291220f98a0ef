"""Real signals and a full disk: what was complete stays, and the run can go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.chaos import training_workers
from pipeline import train
from pipeline.config import RunConfig, dump_config
from pipeline.errors import RunFailed, UserError
from pipeline.report.run import run_page
from pipeline.runs.folder import FORMER_RECORD, RunFolder
from pipeline.runs.metrics import MetricsFile
from pipeline.runs.result import TrainResult
from pipeline.runs.scratch import scratch_of
from strategies.checkpoints.manifest import verify
from tests.pipeline.training.test_train import Recorder
from tests.runs import LONG
from tests.waiting import WAIT_S, wait_for

ROOT = Path(__file__).parents[3]


@pytest.fixture
def quiet(finished_full: TrainResult) -> TrainResult:
    """The `LONG` run that nothing happened to."""
    return finished_full


def ledger_of(result: TrainResult) -> list[dict[str, Any]]:
    return MetricsFile(RunFolder(result.run_dir).ledger).read()


def nothing_is_repeated_or_left_out(result: TrainResult) -> None:
    """Every step is in the metrics and in the ledger once, and in every epoch each pair is in the ledger once."""
    assert result.history.dropna(subset=["loss"])["step"].tolist() == list(range(1, 41))
    records = ledger_of(result)
    assert [record["step"] for record in records] == list(range(1, 41))
    epochs = [sorted(row for record in records[start : start + 4] for row in record["row_ids"]) for start in range(0, 40, 4)]
    assert all(len(set(epoch)) == len(epoch) == 32 for epoch in epochs)
    assert all(epoch == epochs[0] for epoch in epochs)


def events_of(result: TrainResult) -> list[dict[str, Any]]:
    return (RunFolder(result.run_dir).state() or {})["events"]


def page_of(folder: RunFolder) -> str:
    """The page that the run has left, without plotly."""
    html = Path(str(folder.path), "report.html").read_text(encoding="utf-8")
    return html[html.index("<body>") :]


def scratch_is_gone(folder: RunFolder) -> bool:
    state = folder.state() or {}
    return not any(scratch_of(state[name] or "none").exists() for name in ("scratch", "former_scratch"))


def same_weights(one: TrainResult, other: TrainResult) -> None:
    mine, theirs = (load_file(result.model_dir / "model.safetensors") for result in (one, other))
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=0)


def hit(recipe: Any, folder: RunFolder, number: int, display: Recorder, rank: int = 1, **keys: Any) -> TrainResult:
    """A `LONG` run, one of whose workers gets a signal after the checkpoint of step 8."""

    def send() -> None:
        wait_for(lambda: 8 in folder.checkpoints())
        training_workers()[rank].send_signal(number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    ray = {"num_workers": 2, "max_failures": 1, **keys.pop("ray", {})}
    result = train(recipe(folder.path, **{**LONG, **keys}, ray=ray), display=display)
    sender.join()
    return result


MOMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "evaluating": (0, {"eval_steps": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 4}),
    "saving": (1, {"save_steps": 1, "save_total_limit": 20}),
}
"""What a worker mostly does when it is killed, and which of the two it is; while it trains, the main job's is killed."""


@pytest.mark.parametrize("moment", [pytest.param("evaluating", marks=pytest.mark.release), "saving"])
def test_a_killed_worker_changes_nothing_but_the_time(recipe: Any, quiet: TrainResult, tmp_path: Path, moment: str) -> None:
    """SIGKILL in the middle: the run restarts from the checkpoint, and ends with the weights of a quiet run."""
    display = Recorder()
    rank, keys = MOMENTS[moment]
    killed = hit(recipe, RunFolder(tmp_path / "killed"), signal.SIGKILL, display, rank, **keys)
    text = "\n".join(display.notes)
    assert re.search(r"worker \d on \S+ died at \d\d:\d\d:\d\d after step \d+: ", text), text
    assert re.search(r"restarting from the checkpoint of step \d+ \(restart 1 of 1\)", text), text
    saved = [note for note in display.notes if note.startswith("saved ")]
    assert saved == sorted(set(saved))
    found = re.search(r"continuing from the checkpoint of step (\d+)(?:: (\d+) steps? (?:is|are) repeated)?", text)
    assert found is not None, text
    assert int(found[2] or 0) <= 8
    page = page_of(RunFolder(killed.run_dir))
    assert [event["event"] for event in events_of(killed)] == ["began", "training", "failure", "training", "ended"]
    assert re.search(r"worker \d on \S+ died: .*restart 1 \(ray.max_failures\)", page, flags=re.DOTALL), page
    assert "<b>1</b><span>restarts after failures" in page and "Vertical lines mark steps" in page
    nothing_is_repeated_or_left_out(killed)
    assert ledger_of(killed) == ledger_of(quiet)
    same_weights(killed, quiet)
    assert scratch_is_gone(RunFolder(killed.run_dir))


def test_a_worker_that_hangs_is_killed_and_the_run_goes_on(recipe: Any, quiet: TrainResult, tmp_path: Path) -> None:
    """SIGSTOP: the process is there, holds its connections, and does nothing."""
    display = Recorder()
    hung = hit(recipe, RunFolder(tmp_path / "hung"), signal.SIGSTOP, display, ray={"hang_timeout": 20})
    text = "\n".join(display.notes)
    assert re.search(r"worker \d on \S+ hung: no sign of life since \S+, after step \d+ \(ray.hang_timeout: 20 s\)", text), text
    assert not [worker for worker in training_workers() if worker.status() == psutil.STATUS_STOPPED]
    assert re.search(r"worker \d on \S+ hung: no sign of life since", page_of(RunFolder(hung.run_dir)))
    nothing_is_repeated_or_left_out(hung)
    same_weights(hung, quiet)


@pytest.mark.driver
def test_sigterm_saves_and_the_run_goes_on_as_if_nothing_was(recipe: Any, quiet: TrainResult, tmp_path: Path) -> None:
    cfg = recipe(tmp_path / "run", **LONG)
    folder, process = RunFolder(tmp_path / "run"), started(cfg, tmp_path)
    wait_for(lambda: folder.checkpoints() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, errors
    found = re.search(r"stopped by SIGTERM after step (\d+), checkpoint complete; continue with --resume", errors)
    assert found is not None, errors
    assert "Traceback" not in errors
    step = int(found[1])
    assert folder.checkpoints()[-1] == step < 40
    assert scratch_is_gone(folder)
    assert (folder.finished_steps(), folder.model.exists()) == (None, False)
    assert "<b>stopped</b>" in page_of(folder) and f"stopped: stopped by SIGTERM after step {step}" in page_of(folder)
    assert [record["step"] for record in MetricsFile(folder.ledger).read()] == list(range(1, step + 1))
    lines = folder.ledger.read_text().splitlines(keepends=True)
    folder.ledger.write_text("".join(lines[:2]))  # as if the driver had been lost before it wrote the others
    resumed = train(cfg, resume=True)
    told = [event["event"] for event in events_of(resumed)]
    assert told == ["began", "training", "ended", "began", "training", "ended"]
    assert "continued on " in page_of(folder) and "<b>finished</b>" in page_of(folder)
    nothing_is_repeated_or_left_out(resumed)
    assert ledger_of(resumed) == ledger_of(quiet)
    same_weights(resumed, quiet)


def record_of(*names: str) -> str:
    """What Ray wrote of the checkpoints that were reported to it."""
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {"selected": 0}} for name in names]
    nothing: dict[str, list[Any]] = {"pending_training_results": [], "pending_validation_specs": []}
    nothing |= {f"{what}_checkpoint_dir_names": [] for what in ("validated", "timed_out_validation", "failed_validation")}
    listed = {"checkpoint_results": results, "checkpoint_report_indices": list(range(len(names))), **nothing}
    return json.dumps({**listed, "latest_checkpoint_result": results[-1], "current_report_index": len(names)})


def test_what_stands_in_the_way_of_a_resumed_run(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """A damaged checkpoint: the one before it is used, and the damaged one is the first to be deleted.

    A record of Ray's that an earlier version has left: Ray would restore it, and refuse to start without the checkpoint that is
    gone; the run's folder has nothing of Ray's in the end.
    """
    folder = RunFolder(tmp_path / "run")
    train(recipe(folder.path))
    (tmp_path / "run" / "checkpoint-000012" / "manifest-00001-of-00002.json").write_text("{}")
    shutil.rmtree(tmp_path / "run" / "checkpoint-000004")
    (tmp_path / "run" / FORMER_RECORD).write_text(record_of("checkpoint-000004", "checkpoint-000008", "checkpoint-000012"))
    display = Recorder()
    train(recipe(folder.path, num_epochs=4, save_total_limit=3), resume=True, display=display)
    assert any(re.match(r"checkpoint-000012 is not used: .* doesn't say what a manifest says", note) for note in display.notes)
    assert any(note.startswith("continuing from the checkpoint of step 8") for note in display.notes)
    assert display.notes.count("saved checkpoint-000016") == 1
    assert [record["step"] for record in MetricsFile(folder.ledger).read()] == list(range(1, 17))
    left = {path.name for path in (tmp_path / "run").iterdir()} - {".validate_storage_marker"}  # of every run of Ray
    files = {"config.yaml", "metrics.jsonl", "ledger.jsonl", "run.json", "report.html", "findings.json", "model"}
    assert left == files | {"checkpoint-000008", "checkpoint-000012.2", "checkpoint-000016"}


def has_ended(process: psutil.Process) -> bool:
    """Also when nobody has asked for its exit status, as in a container without an init process."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def name_of(process: psutil.Process) -> str:
    """Empty of a process that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


@pytest.mark.driver
def test_a_killed_driver_is_started_again(recipe: Any, quiet: TrainResult, tmp_path: Path) -> None:
    """SIGKILL to the command: its workers end with it, and --resume gives the run that nothing happened to."""
    cfg = recipe(tmp_path / "run", **LONG)
    folder, process = RunFolder(tmp_path / "run"), started(cfg, tmp_path)
    wait_for(lambda: 8 in folder.checkpoints() or process.poll() is not None)
    agents = ("ray::Dashboard", "ray::RuntimeEnv")  # Ray's own, which look for its head for a minute
    left = [child for child in psutil.Process(process.pid).children(recursive=True) if not name_of(child).startswith(agents)]
    process.kill()
    process.communicate(timeout=WAIT_S)
    wait_for(lambda: all(map(has_ended, left)))
    assert "Nobody has recorded the end of this run" in run_page(folder)
    resumed = train(cfg, resume=True)
    assert [event["event"] for event in events_of(resumed)] == ["began", "training", "began", "training", "ended"]
    nothing_is_repeated_or_left_out(resumed)
    assert ledger_of(resumed) == ledger_of(quiet)
    same_weights(resumed, quiet)


@pytest.mark.driver
@pytest.mark.release
def test_a_second_sigterm_stops_at_once(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    cfg = recipe(tmp_path / "run", num_epochs=500, eval_steps=2000, save_steps=2000)
    folder, process = RunFolder(tmp_path / "run"), started(cfg, tmp_path)
    wait_for(lambda: folder.metrics.exists() or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not is_pending(process.pid, signal.SIGTERM))  # two that are pending at once are one
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM" in errors
    assert "Traceback" not in errors
    assert scratch_is_gone(folder)


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has yet to take a signal that it was sent."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"^(?:Sig|Shd)Pnd:\s+(\w+)", status, re.MULTILINE))


@pytest.mark.main_job
def test_a_loss_that_is_not_finite_ends_the_run_with_its_pairs(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """No restart: it would come to the same batch."""
    display = Recorder()
    cfg = recipe(tmp_path / "run", learning_rate=1e30, ray={"num_workers": 2, "max_failures": 3})
    with pytest.raises(UserError, match=r"step 2: the loss is not finite for rows \d+.*; the step was not taken: "):
        train(cfg, display=display)
    assert not any("restart" in note for note in display.notes)
    page = page_of(RunFolder(tmp_path / "run"))
    assert "<b>failed</b>" in page and "failed: step 2: the loss is not finite for rows" in page
    assert scratch_is_gone(RunFolder(tmp_path / "run"))


def started(cfg: RunConfig, folder: Path) -> subprocess.Popen[str]:
    """`prefray train` in a process of its own."""
    recipe_file = folder / "recipe.yaml"
    recipe_file.write_text(dump_config(cfg))
    command = [sys.executable, "-m", "pipeline", "train", str(recipe_file), "--quiet"]
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=pipe, stdout=pipe, text=True, start_new_session=True)


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
    assert not list(folder.path.glob(".*.partial"))
    assert verify(folder.path / f"checkpoint-{folder.checkpoints()[-1]:06d}") is None
    assert folder.finished_steps() is None
    assert scratch_is_gone(folder)


@pytest.mark.driver
def test_ctrl_c_leaves_a_checkpoint_and_status_130(recipe: Any, ray_session: Any, tmp_path: Path) -> None:
    """SIGINT to the whole foreground group, as a terminal sends it; afterwards --resume ends the run."""
    cfg = recipe(tmp_path / "run", num_epochs=50, eval_steps=50, save_steps=5)
    process = started(cfg, tmp_path)
    folder = RunFolder(Path(cfg.output_dir))
    wait_for(lambda: folder.checkpoints() or process.poll() is not None)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, errors
    assert "continue with --resume" in errors
    assert "Traceback" not in errors
    last = folder.checkpoints()[-1]
    assert "<b>interrupted</b>" in page_of(folder)
    assert scratch_is_gone(folder)
    display = Recorder()
    result = train(
        recipe(folder.path, num_epochs=4, eval_steps=50, save_steps=5) if last < 16 else cfg, resume=True, display=display
    )
    assert any(note.startswith(f"continuing from the checkpoint of step {last}") for note in display.notes)
    assert [record["step"] for record in MetricsFile(folder.metrics).read() if "loss" in record] == list(
        range(1, result.steps + 1)
    )
