"""Checkpoints in a run's storage: complete, half stored, damaged, or not recorded yet."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from pipeline import patience
from pipeline.training import checkpoints
from pipeline.training.checkpoints import RAY_STATE, clean, complete, free_name, recorded, repair, stage, step_of, store
from strategies.checkpoints.manifest import find_damage, write_manifest

LOCAL = LocalFileSystem()


def write_part(folder: Path, rank: int, world_size: int = 2) -> None:
    """What a rank leaves of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"state-{rank:05d}-of-{world_size:05d}.safetensors").write_bytes(bytes([rank]) * 1000)
    if rank == 0:
        (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder, rank, world_size, {"pieces": {}})


def write_whole(folder: Path, world_size: int = 2) -> None:
    for rank in range(world_size):
        write_part(folder, rank, world_size)


def record(run: Path, *names: str) -> None:
    """Write Ray's list of checkpoints."""
    entries = [{"checkpoint_dir_name": name, "metrics": {}} for name in names]
    state = {"checkpoint_results": entries, "checkpoint_report_indices": list(range(len(names)))}
    (run / RAY_STATE).write_text(json.dumps({**state, "latest_checkpoint_result": entries[-1]}))


def test_ranks_store_their_parts_and_the_last_one_completes_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "local")
    for rank in (1, 0):
        assert complete(LOCAL, str(tmp_path / "run")) == []
        staged = stage(tmp_path / "local", rank, tmp_path / f"storing-{rank}")
        store(staged, LOCAL, str(tmp_path / "run" / "checkpoint-000004"))
    assert complete(LOCAL, str(tmp_path / "run")) == ["checkpoint-000004"]
    assert find_damage(tmp_path / "run" / "checkpoint-000004") is None


def test_the_manifest_is_stored_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "local", 1)
    order, copy = [], checkpoints.copy_file
    monkeypatch.setattr(checkpoints, "copy_file", lambda source, *rest: (order.append(source.name), copy(source, *rest)))
    store(stage(tmp_path / "local", 0, tmp_path / "staged"), LOCAL, str(tmp_path / "run" / "c"))
    assert order[-1] == "manifest-00000-of-00001.json"
    assert len(order) == 3


def test_storage_that_fails_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "local", 1)
    copy, failures = checkpoints.copy_file, [OSError(errno.EIO, "gone"), OSError(errno.EROFS, "read-only")]

    def fail_first(*given: Any) -> None:
        if failures:
            raise failures.pop()
        copy(*given)

    monkeypatch.setattr(checkpoints, "copy_file", fail_first)
    monkeypatch.setattr(patience.time, "sleep", lambda _: None)
    store(stage(tmp_path / "local", 0, tmp_path / "staged"), LOCAL, str(tmp_path / "run" / "checkpoint-000001"))
    assert complete(LOCAL, str(tmp_path / "run")) == ["checkpoint-000001"]


def test_a_full_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "local", 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "copy_file", full)
    monkeypatch.setattr(patience.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(OSError, match="No space left"):
        store(stage(tmp_path / "local", 0, tmp_path / "staged"), LOCAL, str(tmp_path / "run" / "c"))


def test_newest_first_and_a_second_of_the_same_step_before_the_first(tmp_path: Path) -> None:
    for name in ("checkpoint-000004", "checkpoint-000010", "checkpoint-000004.2"):
        write_whole(tmp_path / name)
    assert complete(LOCAL, str(tmp_path)) == ["checkpoint-000010", "checkpoint-000004.2", "checkpoint-000004"]
    assert [step_of(name) for name in complete(LOCAL, str(tmp_path))] == [10, 4, 4]


def test_what_is_half_stored_is_removed_and_what_is_complete_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "checkpoint-000004")
    write_whole(tmp_path / "checkpoint-000008")
    write_part(tmp_path / "checkpoint-000012", 1)
    record(tmp_path, "checkpoint-000004")
    clean(LOCAL, str(tmp_path))
    assert complete(LOCAL, str(tmp_path)) == ["checkpoint-000008", "checkpoint-000004"]
    assert recorded(LOCAL, str(tmp_path)) == ["checkpoint-000004"]
    assert not (tmp_path / "checkpoint-000012").exists()


def test_a_name_that_is_taken_is_not_used_again(tmp_path: Path) -> None:
    assert free_name(LOCAL, str(tmp_path), 4) == "checkpoint-000004"
    (tmp_path / "checkpoint-000004").mkdir()
    assert free_name(LOCAL, str(tmp_path), 4) == "checkpoint-000004.2"
    (tmp_path / "checkpoint-000004.2").mkdir()
    assert free_name(LOCAL, str(tmp_path), 4) == "checkpoint-000004.3"


def test_ray_is_not_left_with_checkpoints_that_are_gone(tmp_path: Path) -> None:
    write_whole(tmp_path / "checkpoint-000004")
    write_part(tmp_path / "checkpoint-000008", 0)
    record(tmp_path, "checkpoint-000004", "checkpoint-000008", "checkpoint-000012")
    assert repair(LOCAL, str(tmp_path)) == ["checkpoint-000008", "checkpoint-000012"]
    assert recorded(LOCAL, str(tmp_path)) == ["checkpoint-000004"]
    state = json.loads((tmp_path / RAY_STATE).read_text())
    assert state["latest_checkpoint_result"]["checkpoint_dir_name"] == "checkpoint-000004"
    assert not (tmp_path / "checkpoint-000008").exists()
    assert repair(LOCAL, str(tmp_path)) == []


@pytest.mark.parametrize("content", ["", '{"checkpoint_results": [{"checkp'])
def test_what_ray_was_writing_when_it_was_killed_is_no_obstacle(tmp_path: Path, content: str) -> None:
    write_whole(tmp_path / "checkpoint-000004")
    (tmp_path / RAY_STATE).write_text(content)
    assert recorded(LOCAL, str(tmp_path)) == []
    assert repair(LOCAL, str(tmp_path)) == []
    assert not (tmp_path / RAY_STATE).exists()
    assert complete(LOCAL, str(tmp_path)) == ["checkpoint-000004"]


def test_a_folder_of_another_name_is_none_of_ours(tmp_path: Path) -> None:
    write_whole(tmp_path / "checkpoint-final")
    clean(LOCAL, str(tmp_path))
    assert complete(LOCAL, str(tmp_path)) == []
    assert (tmp_path / "checkpoint-final").exists()
