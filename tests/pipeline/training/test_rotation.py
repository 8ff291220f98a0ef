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
