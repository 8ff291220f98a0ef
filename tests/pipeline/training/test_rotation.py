"""Which checkpoints a worker deletes while later ones are being stored."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from pyarrow.fs import LocalFileSystem

from pipeline.runs.checkpoints import complete
from pipeline.training import worker_checkpoints
from pipeline.training.worker_callbacks import Attempt, RayReportCallback
from strategies.batch.row_ledger import Ledger
from strategies.checkpoints.manifest import write_manifest


def test_the_best_checkpoint_stays_until_a_better_one_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the report of 20 the trainer's best is 30 already, of which nothing is stored yet."""
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    run.mkdir()
    storage = SimpleNamespace(storage_filesystem=LocalFileSystem(), experiment_fs_path=str(run))
    context = SimpleNamespace(get_storage=lambda: storage, get_world_rank=lambda: 0)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    monkeypatch.setattr(worker_checkpoints, "broadcast_from_rank_zero", lambda name: name)
    store, begun, may_store = worker_checkpoints.store, threading.Event(), threading.Event()

    def waiting(staged: Path, filesystem: Any, target: str) -> None:
        if target.endswith("30"):
            begun.set()
            assert may_store.wait(30)
        store(staged, filesystem, target)

    monkeypatch.setattr(worker_checkpoints, "store", waiting)
    args = SimpleNamespace(output_dir=str(scratch), process_index=0, local_process_index=0, save_total_limit=1)
    checkpoints = worker_checkpoints.WorkerCheckpoints((LocalFileSystem(), str(run)))
    callback = RayReportCallback(checkpoints, scratch, "run", Ledger(), Attempt(None, None, [], {}))

    def save(step: int, best: int) -> None:
        written = scratch / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "trainer_state.json").write_text("{}")
        write_manifest(written, 0, 1, {})
        state = SimpleNamespace(global_step=step, best_model_checkpoint=str(scratch / f"checkpoint-{best}"))
        checkpoints.wait()
        callback.on_save(args, state, None)

    for step, best in ((10, 10), (20, 10), (30, 30)):
        save(step, best)
    assert begun.wait(30)  # one thread stores and deletes, so old checkpoints have been deleted
    assert complete(LocalFileSystem(), str(run)) == ["checkpoint-000020", "checkpoint-000010"]
    may_store.set()
    checkpoints.wait()
    assert complete(LocalFileSystem(), str(run))[0] == "checkpoint-000030"


def test_the_checkpoints_of_a_failed_trainer_are_waited_for_and_their_errors_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    monkeypatch.setattr(worker_checkpoints, "broadcast_from_rank_zero", lambda name: name)
    may_store, done = threading.Event(), threading.Event()

    def store(*_: Any) -> None:
        assert may_store.wait(30)
        done.set()
        raise OSError("no such bucket")

    monkeypatch.setattr(worker_checkpoints, "store", store)
    checkpoints = worker_checkpoints.WorkerCheckpoints((LocalFileSystem(), str(tmp_path / "run")))
    checkpoints.finish()
    written = tmp_path / "checkpoint-4"
    written.mkdir()
    checkpoints.put(written, 4)
    beats: list[None] = []
    # Its first beat is that of a wait that goes on.
    monkeypatch.setattr(worker_checkpoints, "beat", lambda: (beats.append(None), may_store.set()))
    wait = worker_checkpoints.futures.wait
    monkeypatch.setattr(worker_checkpoints.futures, "wait", lambda fs, timeout: wait(fs, 0.01))
    checkpoints.finish()
    assert done.is_set() and beats
    with pytest.raises(OSError, match="no such bucket"):
        checkpoints.wait()
