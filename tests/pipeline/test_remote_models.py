"""Models at URIs: the same models as in folders, by their content; and what is said when there is none."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
from pyarrow import fs
from transformers import AutoModelForCausalLM

from pipeline.config import RunConfig, parse_config
from pipeline.errors import UserError
from pipeline.evaluation.resolve_models import find_subject
from pipeline.io.remote_models import fetch_models, find_models
from pipeline.io.storage import resolve
from pipeline.reference.fingerprint import reference_identity
from strategies.inference.reference import load_reference_alone
from strategies.models.location import resolve_model_location
from strategies.models.tokenizer import load_tokenizer
from tests.leases import SharedFileSystem
from tests.s3 import Bucket, S3Server
from tests.tiny import adapter_folder, save_tiny


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this node, empty."""
    monkeypatch.setenv("PREFRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with weights that no other test uses."""
    return save_tiny(tmp_path_factory.mktemp("base") / "base", seed=3)


def upload(folder: str, bucket: Bucket, name: str) -> str:
    """Put a folder into the bucket; returns its URI."""
    filesystem, path = resolve(bucket.uri(name))
    fs.copy_files(folder, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    return bucket.uri(name)


def put(bucket: Bucket, key: str, content: bytes) -> None:
    boto3.Session().client("s3").put_object(Bucket=bucket.name, Key=key, Body=content)


def recipe(**keys: Any) -> RunConfig:
    return parse_config({"datasets": [{"path": "pairs.jsonl"}], **keys})


def copy_of(uri: str) -> Path:
    return Path(resolve_model_location(uri).path)


def weights_of(cfg: RunConfig) -> dict[str, Any]:
    return load_reference_alone(cfg, load_tokenizer(cfg)).state_dict()


def test_a_model_is_the_same_at_a_uri(s3: Bucket, base: str, cache: Path, tmp_path: Path) -> None:
    """Fingerprint, weights, tokenizer; its name is the URI. Config and tokenizer come alone until weights are asked for."""
    adapter = adapter_folder(tmp_path / "adapter")
    here = recipe(base_model=base, adapter="lora", lora_model_dir=adapter)
    there = recipe(base_model=upload(base, s3, "base"), adapter="lora", lora_model_dir=upload(adapter, s3, "adapter"))
    put(s3, "base/model.onnx", b"of another library")
    put(s3, "base/checkpoint-1/model.safetensors", b"of another step")
    fetch_models(there)
    names = {str(file.relative_to(copy_of(s3.uri("base")))) for file in copy_of(s3.uri("base")).rglob("*")}
    assert names == {file.name for file in Path(base).iterdir()} - {"model.safetensors"}
    assert reference_identity(there) == reference_identity(here)
    mine, theirs = weights_of(there), weights_of(here)
    assert mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in theirs)
    assert load_tokenizer(there).get_vocab() == load_tokenizer(here).get_vocab()
    assert copy_of(s3.uri("base")).is_relative_to(cache) and copy_of(s3.uri("base")).name == "base"
    find_models(recipe(base_model="org/model", tokenizer_config=s3.uri("base"))).bring()
    assert not (copy_of(s3.uri("base")) / "model.safetensors").exists()
    find_models(there).bring()
    assert load_reference_alone(there, None).get_base_model().name_or_path == s3.uri("base")


def test_a_model_is_brought_once(s3: Bucket, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is gone from the cache is brought again."""
    models = find_models(recipe(base_model=upload(base, s3, "base")))
    models.bring()
    first = copy_of(s3.uri("base"))
    inode = (first / "model.safetensors").stat().st_ino
    find_models(recipe(base_model=s3.uri("base"))).bring()
    assert (first / "model.safetensors").stat().st_ino == inode
    shutil.rmtree(first)
    models.bring()
    AutoModelForCausalLM.from_pretrained(copy_of(s3.uri("base")))


def test_a_model_that_changes_is_another(s3: Bucket, base: str, tmp_path: Path) -> None:
    """A driver brings it anew, with another fingerprint; a job of a driver that saw the former one doesn't go on with it."""
    cfg = recipe(base_model=upload(base, s3, "base"))
    fetch_models(cfg)
    jobs, before = find_models(cfg), reference_identity(cfg)
    upload(save_tiny(tmp_path / "other", seed=4), s3, "base")
    shutil.rmtree(copy_of(s3.uri("base")))
    with pytest.raises(UserError, match=r"s3://.*/base has changed since it was looked at: model.safetensors is another"):
        jobs.bring()
    fetch_models(cfg)
    assert reference_identity(cfg) != before
    assert reference_identity(cfg) == reference_identity(recipe(base_model=str(tmp_path / "other")))


def cut(bucket: Bucket) -> None:
    put(bucket, "base/model.safetensors", bucket.content("base/model.safetensors")[:-10])


def lose(bucket: Bucket, name: str) -> None:
    boto3.Session().client("s3").delete_object(Bucket=bucket.name, Key=f"base/{name}")


def shard(bucket: Bucket) -> None:
    put(bucket, "base/model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bucket: bucket.empty(), "base_model: there is no model at 's3://.*/base': no such bucket, or nothing under"),
        (cut, r"base_model: 's3://.*/base' is damaged: model.safetensors has \d+ bytes, and its tensors take"),
        (shard, "base_model: 's3://.*/base' lacks 1 files that its index names, such as model-2.safetensors"),
        (
            lambda bucket: lose(bucket, "config.json"),
            "base_model: 's3://.*/base' holds no config.json or adapter_config.json; it",
        ),
        (lambda bucket: lose(bucket, "model.safetensors"), "base_model: 's3://.*/base' holds a model's config and no weights"),
    ],
)
def test_what_is_no_whole_model(s3: Bucket, base: str, damage: Callable[[Bucket], None], message: str) -> None:
    cfg = recipe(base_model=upload(base, s3, "base"))
    damage(s3)
    with pytest.raises(UserError, match=message):
        fetch_models(cfg)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base_model": "s3://no-such-bucket/model"}, "base_model: there is no model at 's3://no-such-bucket/model': no such"),
        ({"base_model": "nowhere://bucket/model"}, "base_model: cannot open 'nowhere://bucket/model'"),
        ({"reference_model": "s3://key:word@bucket/model"}, r"reference_model: 's3://\*\*\*@bucket/model' has keys in it"),
        (
            {"reference_model": "s3://no-such-bucket/m.gguf"},
            "reference_model: there is no model at 's3://no-such-bucket/m.gguf'",
        ),
    ],
)
def test_a_uri_without_a_model(s3: Bucket, keys: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch_models(recipe(**{"base_model": "org/model", **keys}))


def test_who_may_not_read_and_a_store_that_goes_away(own_s3: S3Server, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = recipe(base_model=upload(base, own_s3, "base"))
    fetch_models(cfg)
    jobs = find_models(cfg)
    with monkeypatch.context() as other:
        other.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with pytest.raises(UserError, match="base_model: 's3://bucket/base' can't be read: .*S3's keys are read from"):
            fetch_models(cfg)
    own_s3.stop()
    with pytest.raises(UserError, match="base_model: 's3://bucket/base' can't be read"):
        fetch_models(cfg)
    own_s3.start()
    jobs.bring()


def test_a_cache_that_is_too_small(s3: Bucket, base: str) -> None:
    cfg = recipe(base_model=upload(base, s3, "base"), ray={"cache_size": "0.05MB"})
    with pytest.raises(UserError, match="ray.cache_size: the files of s3://.*/base take about .* set .* or more"):
        find_models(cfg).bring()


def test_a_file_of_weights(s3: Bucket) -> None:
    """A GGUF file is read from the cache under its own name, and no other file is taken for one."""
    put(s3, "model.gguf", b"GGUF and more")
    fetch_models(recipe(base_model=s3.uri("model.gguf")))
    location = resolve_model_location(s3.uri("model.gguf"))
    assert Path(location.path, location.kwargs["gguf_file"]).read_bytes() == b"GGUF and more"
    put(s3, "model.gguf", b"a text")
    with pytest.raises(UserError, match="base_model: .*/model.gguf' is damaged: model.gguf is no GGUF file"):
        fetch_models(recipe(base_model=s3.uri("model.gguf")))
    put(s3, "readme.txt", b"a text")
    with pytest.raises(UserError, match="readme.txt' is a file; give the folder of a model, or a .gguf file"):
        fetch_models(recipe(base_model=s3.uri("readme.txt")))


def test_subjects_at_uris(s3: Bucket, base: str, tmp_path: Path) -> None:
    """A model, and an adapter, whose base is at a URI too."""
    model = upload(base, s3, "base")
    assert find_subject(model).policy.base_model == model
    adapter = adapter_folder(tmp_path / "adapter")
    config = Path(adapter, "adapter_config.json")
    config.write_text(config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{model}"'))
    subject = find_subject(upload(adapter, s3, "adapter"))
    assert (subject.policy.lora_model_dir, subject.policy.base_model) == (s3.uri("adapter"), model)
    assert subject.reference_name == model
    assert find_subject(model, reference=s3.uri("adapter")).reference_name == s3.uri("adapter")
    with pytest.raises(UserError, match=r"RUN\|MODEL: there is no model at"):
        find_subject(s3.uri("nothing"))


@pytest.mark.parametrize("given", [{"etag": True}, {}])
def test_a_model_that_changes_where_fsspec_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, bool]
) -> None:
    """Stores that report no time of modification: by their etag, and without one by the content."""
    model = Path(save_tiny(tmp_path / "model", seed=4))

    def info(store: Any, path: Any, **_: Any) -> dict[str, Any]:
        path = os.fspath(path)
        size = Path(path).stat().st_size if Path(path).is_file() else 0
        etag = {"ETag": hashlib.sha256(Path(path).read_bytes()).hexdigest()} if given and size else {}
        return {"name": path, "size": size, "type": "file" if Path(path).is_file() else "directory", **etag}

    monkeypatch.setattr(SharedFileSystem, "info", info)
    cfg = recipe(base_model=f"shared://{model}")
    fetch_models(cfg)
    before = find_models(cfg)
    fetch_models(cfg)
    assert find_models(cfg).models[0].files == before.models[0].files
    save_tiny(model, seed=5)  # of the same size
    fetch_models(cfg)
    pairs = zip(before.models[0].files, find_models(cfg).models[0].files, strict=True)
    changed = {new.name for old, new in pairs if old != new}
    assert changed == {"model.safetensors"}
