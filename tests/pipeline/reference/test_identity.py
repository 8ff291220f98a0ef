"""The name of the scores: what changes a log-probability changes it, and nothing else does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.errors import UserError
from pipeline.io.digests import file_digest
from pipeline.io.storage import Folder
from pipeline.reference.fingerprint import base_fingerprint, pin_base, pin_revision, reference_identity
from pipeline.reference.hashing import ids_digests
from pipeline.reference.precision import Precision, resolve_precision
from tests.tiny import adapter_folder, save_tiny, tiny_tokenizer

CPU = {"use_gpu": False}


def identity(cfg: Any) -> dict[str, Any]:
    return reference_identity(cfg)


def test_one_weight(recipe: Any, tmp_path: Path) -> None:
    folder = Path(save_tiny(tmp_path / "model"))
    cfg = recipe(reference_model=str(folder))
    first = identity(cfg)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    second = identity(cfg)
    assert {key for key in first["model"]["files"] if first["model"]["files"][key] != second["model"]["files"][key]} == {
        "model.safetensors"
    }
    assert base_fingerprint(cfg) == base_fingerprint(recipe())  # its base model is another one, and stayed
    assert base_fingerprint(recipe(base_model=str(folder))) != base_fingerprint(cfg)


def test_the_same_model_in_another_folder(recipe: Any, tiny_base: str, tmp_path: Path) -> None:
    copy = save_tiny(tmp_path / "copy")
    (tmp_path / "copy" / "training_args.bin").write_bytes(b"of no concern")
    assert identity(recipe(reference_model=copy)) == identity(recipe(base_model=copy)) == identity(recipe(base_model=tiny_base))


def test_what_changes_the_reference(recipe: Any, tmp_path: Path) -> None:
    plain = identity(recipe())
    adapter = adapter_folder(tmp_path / "adapter")
    for keys in (
        {"adapter": "lora", "lora_model_dir": adapter},
        {"overrides_of_model_config": {"rope_theta": 5.0}},
        {"overrides_of_model_kwargs": {"use_cache": False}},
        {"tokens": ["<new>"]},
        {"adapter": "qlora", "load_in_4bit": True},
        {"base_model_config": save_tiny(tmp_path / "other", rms_norm_eps=1e-3)},
    ):
        assert identity(recipe(**keys)) != plain, keys
    for keys in (
        {"adapter": "lora", "lora_r": 4},
        {"attn_implementation": "eager"},
        {"overrides_of_model_kwargs": {"attn_implementation": "eager"}},
        {"seed": 1},
        {"disable_dropout": False},
    ):
        assert identity(recipe(**keys)) == plain, keys


def test_the_seed_counts_where_the_embeddings_grow(recipe: Any) -> None:
    grown = [identity(recipe(tokens=["<new>"], seed=seed)) for seed in (1, 1, 2)]
    assert grown[0] == grown[1] != grown[2]
    assert grown[0]["grown_embeddings"] == {"tokens": len(tiny_tokenizer()) + 1, "seed": 1, "x32": False}


def test_shards_and_their_index(recipe: Any, tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    tiny_model(tiny_tokenizer()).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    files = identity(recipe(base_model=str(tmp_path / "sharded")))["model"]["files"]
    shards = [path.name for path in (tmp_path / "sharded").glob("*.safetensors")]
    assert len(shards) > 1
    assert set(files) == {"config.json", "model.safetensors.index.json", *shards}


def test_a_gguf_file(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF of no size")
    with pytest.raises(UserError, match="^reference_model: no model could be loaded from .*model.gguf"):
        identity(recipe(reference_model=str(tmp_path / "model.gguf")))


def test_a_hub_id_is_its_commit(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local copy of a repository, as the hub's client lays it out; nothing is asked of the network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--owner--name"
    save_tiny(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cfg = recipe(reference_model="owner/name")
    found = identity(cfg)
    assert found["model"] == {"hub": "owner/name", "commit": commit}
    assert pin_revision(cfg, found).overrides_of_model_kwargs == {"revision": commit}
    with pytest.raises(UserError, match="^reference_model: no model could be loaded from 'owner/none'"):
        identity(recipe(reference_model="owner/none"))
    assert pin_base(recipe(base_model="owner/name")).revision_of_model == commit
    assert pin_base(cfg) == cfg  # whose base is a folder
    with pytest.raises(UserError, match="^base_model: no model could be loaded from 'owner/none'"):
        pin_base(recipe(base_model="owner/none"))


def test_the_base_of_an_adapter_that_is_the_model_counts(recipe: Any, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_tiny(base)
    adapter = Path(adapter_folder(tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    cfg = recipe(reference_model=str(adapter))
    before = identity(cfg)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(base)
    assert identity(cfg)["model"]["files"] == before["model"]["files"] and identity(cfg) != before


def test_an_empty_folder(recipe: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="^reference_model: no model could be loaded from .*: it holds no config and no weights"
    ):
        identity(recipe(reference_model=str(tmp_path)))


def test_text_counts_for_nothing_and_every_token_counts(prepared: Any, tmp_path: Path) -> None:
    file = prepared.train_files()[0]
    table = pq.read_table(file, partitioning=None)

    def digest(column: str, values: Any) -> str:
        place = table.column_names.index(column)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        pq.write_table(table.set_column(place, table.schema.field(column), values), path)
        return ids_digests(replace(prepared, folder=Folder(tmp_path)), [path.name])[0]

    (first,) = ids_digests(prepared, prepared.parts("train")[:1])
    assert digest("chosen", pa.array(["other"] * len(table), pa.large_string())) == first
    ids = table["chosen_ids"].to_pylist()
    ids[-1][-1] += 1
    assert digest("chosen_ids", pa.array(ids, pa.list_(pa.int32()))) != first
    moved = table["chosen_ids"].to_pylist()
    moved[1].insert(0, moved[0].pop())
    assert digest("chosen_ids", pa.array(moved, pa.list_(pa.int32()))) != first
    assert digest("row_id", pa.array(range(len(table)), pa.int64())) != first


def test_a_file_is_read_once_as_long_as_it_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    path = tmp_path / "weights"
    path.write_bytes(b"one")
    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: (reads.append(1), digest(*args))[1])
    assert file_digest(path) == file_digest(path) == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"three")
    assert file_digest(path) == hashlib.sha256(b"three").hexdigest()
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("keys", "gpu", "expected"),
    [
        ({}, False, Precision("float32", None, False)),
        ({}, True, Precision("float32", "bfloat16", False)),
        ({"bf16": True}, False, Precision("float32", "bfloat16", False)),
        ({"bf16": "full"}, False, Precision("bfloat16", "bfloat16", False)),
        ({"bf16": False, "tf32": True}, True, Precision("float32", None, True)),
        ({"bf16": False, "tf32": True}, False, Precision("float32", None, False)),
        ({"fp16": True}, True, Precision("float32", "float16", False)),
        ({"adapter": "qlora", "load_in_4bit": True}, True, Precision("bfloat16", "bfloat16", False)),
    ],
)
def test_precision(recipe: Any, keys: dict[str, Any], gpu: bool, expected: Precision) -> None:
    if torch.cuda.is_available():
        pytest.skip("what a GPU has decides on a machine with one")
    assert resolve_precision(recipe(**keys), gpu) == expected
    assert json.loads(json.dumps(expected.as_inputs())) == expected.as_inputs()
