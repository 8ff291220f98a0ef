"""Checkpoints in a run's storage: complete, half stored, damaged, or too many."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem

from pipeline.io import retry as patience
from pipeline.runs import checkpoints
from pipeline.runs.checkpoints import clean, complete, free_name, rotate, stage, step_of, store
from strategies.checkpoints.manifest import verify, write_manifest

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


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_ranks_store_their_parts_and_the_last_one_completes_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "local")
    for rank in (1, 0):
        assert complete(LOCAL, str(tmp_path / "run")) == []
        staged = stage(tmp_path / "local", rank, tmp_path / f"storing-{rank}")
        store(staged, LOCAL, str(tmp_path / "run" / "checkpoint-000004"))
    assert complete(LOCAL, str(tmp_path / "run")) == ["checkpoint-000004"]
    assert verify(tmp_path / "run" / "checkpoint-000004") is None


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
    assert clean(LOCAL, str(tmp_path)) == ["checkpoint-000012"]
    assert complete(LOCAL, str(tmp_path)) == ["checkpoint-000008", "checkpoint-000004"]
    assert folders(tmp_path) == ["checkpoint-000004", "checkpoint-000008"]
    assert clean(LOCAL, str(tmp_path)) == []


def test_a_name_that_is_taken_is_not_used_again(tmp_path: Path) -> None:
    assert free_name(LOCAL, str(tmp_path), 4) == "checkpoint-000004"
    (tmp_path / "checkpoint-000004").mkdir()
    assert free_name(LOCAL, str(tmp_path), 4) == "checkpoint-000004.2"
    (tmp_path / "checkpoint-000004.2").mkdir()
    assert free_name(LOCAL, str(tmp_path), 4) == "checkpoint-000004.3"


ROTATIONS: dict[str, tuple[list[str], str, int, int | None, list[str]]] = {
    "the oldest": (["04", "08", "12", "16"], "16", 2, None, ["12", "16"]),
    "none yet": (["04", "08"], "08", 4, 4, ["04", "08"]),
    "not the best": (["04", "08", "12", "16"], "16", 3, 4, ["04", "12", "16"]),
    "latest and best alone": (["04", "08", "12", "16"], "16", 1, 8, ["08", "16"]),
    "the best is the latest": (["04", "08", "12", "16"], "16", 2, 16, ["12", "16"]),
    "a best that isn't there": (["04", "08", "12"], "12", 2, 6, ["08", "12"]),
    "a damaged one of a later step": (["04", "08", "16", "10"], "10", 2, None, ["08", "10"]),
    "a damaged one that was stored again": (["04", "08", "12", "12.2"], "12.2", 2, None, ["08", "12.2"]),
    "damaged ones, while there is room": (["04", "08", "12", "12.2"], "12.2", 4, None, ["04", "08", "12", "12.2"]),
    "none while the newest is incomplete": (["04", "08"], "20", 1, None, ["04", "08"]),
    "the best, stored again": (["04", "04.2", "08", "12"], "12", 2, 4, ["04.2", "12"]),
}
"""What is deleted: checkpoints, the newest, how many to keep, the best one's step, and what is left."""


@pytest.mark.parametrize("what", list(ROTATIONS))
def test_checkpoints_beyond_the_limit_are_deleted(tmp_path: Path, what: str) -> None:
    names, newest, limit, best, left = ROTATIONS[what]
    for name in names:
        write_whole(tmp_path / f"checkpoint-0000{name}")
    write_part(tmp_path / "checkpoint-000020", 1)  # is being stored
    rotate(LOCAL, str(tmp_path), f"checkpoint-0000{newest}", limit, best)
    assert folders(tmp_path) == sorted(f"checkpoint-0000{name}" for name in [*left, "20"])


def test_what_is_half_deleted_is_not_taken_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And doesn't end the run: storage may be away."""

    class Away(LocalFileSystem):
        def delete_dir(self, path: str) -> None:
            raise OSError(errno.EIO, "gone")

    for step in (4, 8):
        write_whole(tmp_path / f"checkpoint-00000{step}")
    rotate(Away(), str(tmp_path), "checkpoint-000008", 1, None)
    assert complete(LOCAL, str(tmp_path)) == ["checkpoint-000008"]
    assert clean(LOCAL, str(tmp_path)) == ["checkpoint-000004"]


def test_a_folder_of_another_name_is_none_of_ours(tmp_path: Path) -> None:
    write_whole(tmp_path / "checkpoint-final")
    clean(LOCAL, str(tmp_path))
    assert complete(LOCAL, str(tmp_path)) == []
    assert (tmp_path / "checkpoint-final").exists()
