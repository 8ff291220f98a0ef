"""Pieces that some ranks wrote are read by any number of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strategies.checkpoints.manifest import (
    identity_mismatch,
    missing_manifests,
    own_files,
    read_manifests,
    verify,
    write_manifest,
)
from strategies.checkpoints.shards import Shard, ShardReader, write_shards

WHOLE = {"weights/a": torch.arange(12, dtype=torch.float32).view(4, 3), "optimizer.step/a": torch.tensor(7.0)}
IDENTITY = {"strategy": "dpo", "base model": "tiny"}


def write(folder: Path, world_size: int) -> None:
    """Each rank writes its range of every tensor; a tensor of fewer elements than ranks is on some of them."""
    folder.mkdir()
    for rank in range(world_size):
        pieces = []
        for name, tensor in WHOLE.items():
            flat = tensor.flatten()
            start, stop = (flat.numel() * part // world_size for part in (rank, rank + 1))
            if stop > start:
                pieces.append(Shard(name, flat[start:stop], start, tuple(tensor.shape)))
        described = write_shards(folder, rank, world_size, pieces)
        if rank == 0:
            (folder / "trainer_state.json").write_text("{}")
        write_manifest(folder, rank, world_size, {"pieces": described, **({"identity": IDENTITY} if rank == 0 else {})})


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_what_some_ranks_wrote_others_read(tmp_path: Path, writers: int, readers: int) -> None:
    write(tmp_path / "c", writers)
    with ShardReader(tmp_path / "c", read_manifests(tmp_path / "c")) as reader:
        for name, tensor in WHOLE.items():
            total = tensor.numel()
            bounds = [(total * rank // readers, total * (rank + 1) // readers) for rank in range(readers)]
            parts = [reader.read(name, start, stop - start) for start, stop in bounds]
            assert torch.equal(torch.cat(parts), tensor.flatten())
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(reader.read(name), tensor.flatten())
        assert sorted(reader.names("weights/")) == ["weights/a"]


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    write(tmp_path / "c", 2)
    with ShardReader(tmp_path / "c", read_manifests(tmp_path / "c")[:1]) as reader:
        with pytest.raises(ValueError, match="c has no elements 6 to 12 of weights/a"):
            reader.read("weights/a")
        with pytest.raises(ValueError, match="c has no weights/b"):
            reader.read("weights/b")


def test_each_file_is_one_ranks(tmp_path: Path) -> None:
    write(tmp_path / "c", 2)
    (tmp_path / "c" / "rng_state_1.pth").write_bytes(b"x")
    names = [{path.name for path in own_files(tmp_path / "c", rank)} for rank in (0, 1)]
    assert names[0] == {"state-00000-of-00002.safetensors", "manifest-00000-of-00002.json", "trainer_state.json"}
    assert names[1] == {"state-00001-of-00002.safetensors", "manifest-00001-of-00002.json", "rng_state_1.pth"}


def test_a_checkpoint_is_complete_when_every_rank_has_said_so(tmp_path: Path) -> None:
    write(tmp_path / "c", 3)
    names = [path.name for path in (tmp_path / "c").iterdir()]
    assert missing_manifests(names) == []
    assert verify(tmp_path / "c") is None
    (tmp_path / "c" / "manifest-00002-of-00003.json").unlink()
    assert verify(tmp_path / "c") == "c is incomplete: it lacks manifest-00002-of-00003.json"
    assert missing_manifests([]) == ["manifest-00000-of-00001.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.unlink(), "state-00001-of-00002.safetensors is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-3]), "state-00001-of-00002.safetensors has .* bytes, not"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x7f"), "another checksum than its manifest says"),
    ],
)
def test_damage_is_found(tmp_path: Path, change, message: str) -> None:
    write(tmp_path / "c", 2)
    change(tmp_path / "c" / "state-00001-of-00002.safetensors")
    found = verify(tmp_path / "c")
    assert found is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(found)


def test_a_manifest_that_is_no_json_is_damage(tmp_path: Path) -> None:
    write(tmp_path / "c", 1)
    (tmp_path / "c" / "manifest-00000-of-00001.json").write_text('{"format')
    assert "json is no JSON" in str(verify(tmp_path / "c"))


def test_another_runs_checkpoint_differs(tmp_path: Path) -> None:
    write(tmp_path / "c", 1)
    manifest = read_manifests(tmp_path / "c")[0]
    assert identity_mismatch(manifest, IDENTITY) == []
    assert identity_mismatch(manifest, {**IDENTITY, "strategy": "ipo", "new": 1}) == ["strategy: was dpo, is ipo"]
    assert identity_mismatch({**manifest, "format_version": 9}, IDENTITY) == ["format: was 9, this version of prefray reads 1"]


def test_a_manifest_that_another_rank_is_writing_is_in_no_other(tmp_path: Path) -> None:
    (tmp_path / ".manifest-00001-of-00002.json.partial").write_text("{")
    (tmp_path / ".tmpKhJ5XQ").write_text("safetensors writes here first")
    (tmp_path / "trainer_state.json").write_text("{}")
    assert [path.name for path in own_files(tmp_path, 0)] == ["trainer_state.json"]
