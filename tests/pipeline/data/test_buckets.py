"""Prepared data in a bucket: the bytes of those at a path, whatever happens to processes, objects and the bucket."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import boto3
import pytest

from pipeline.data.fingerprint import FORMAT_VERSION
from pipeline.data.preparation import find_prepared
from pipeline.data.store import open_store
from pipeline.errors import UserError
from pipeline.io import filesystems
from pipeline.io.storage import Folder
from tests.killed_stages import kill_and_start_again, prepare_there, versions
from tests.pipeline.data.conftest import make_config, prepare_here, write_jsonl
from tests.s3 import Bucket, S3Server
from tests.tiny import pairs

ROWS = [*pairs(60), *pairs(7), {"prompt": "Q", "chosen": "C"}, {"prompt": "", "chosen": "C", "rejected": "R"}]
"""With duplicates, and rows that can't be used."""
KEYS = {"dataset_exact_deduplication": True, "val_set_size": 0.1, "max_rejected_fraction": 0.5}


def there(data: Path, uri: str, **changes: Any) -> Any:
    return make_config(data.parent, {"path": str(data)}, **{**KEYS, "dataset_prepared_path": uri, **changes})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "a.jsonl", ROWS)


def contents(folder: Folder) -> dict[str, bytes]:
    return {name: folder.read_bytes(name) for name in folder.files() if name != "ids.json"}


def test_a_store_in_a_bucket_has_the_bytes_of_one_at_a_path(s3: Bucket, data: Path, tokenizer: Any) -> None:
    here = prepare_here(there(data, str(data.parent / "prepared")), tokenizer, rows_per_part=10)
    cfg = there(data, s3.uri("prepared"))
    assert find_prepared(cfg) is None
    prepared = prepare_here(cfg, tokenizer, rows_per_part=10)
    assert prepared.path == s3.uri(f"prepared/{here.fingerprint}")
    assert contents(prepared.folder) == contents(here.folder) and len(contents(here.folder)) > 9
    assert prepared.manifest == here.manifest
    for split in ("train", "eval", "rejected"):
        assert prepared.read(split).equals(here.read(split)) and prepared.rows(split) == here.rows(split) > 0
    again = prepare_here(cfg, tokenizer, rows_per_part=10, executor=None)  # opened, else Ray would start
    assert again == prepared
    assert {key.split("/")[1] for key in s3.objects()} == {here.fingerprint}


def test_what_another_writer_has_cut_off_is_written_again(s3: Bucket, data: Path, tokenizer: Any) -> None:
    """A staged part without its end, one with other bytes in it, and rejected rows without theirs."""
    cfg = there(data, s3.uri("prepared"))
    fingerprint = prepare_here(there(data, str(data.parent / "prepared")), tokenizer, rows_per_part=10).fingerprint
    staging = Folder(s3.uri(f"prepared/{fingerprint}/staging"))

    def first_three(work: Any, job: Any, number: int, num_proc: int | None = None) -> Any:
        for index in range(3):
            yield from work(job, index)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_here(cfg, tokenizer, rows_per_part=10, executor=first_three)
    first, second, third = sorted(staging.files())
    staging.write_bytes(first, staging.read_bytes(first)[:-20])
    flipped = bytearray(staging.read_bytes(second))
    flipped[len(flipped) // 3] ^= 1
    staging.write_bytes(second, bytes(flipped))
    written = staging.modified(third)
    seen: list[int | None] = []
    prepared = prepare_here(cfg, tokenizer, lambda _: seen.append(staging.modified(third)), rows_per_part=10)
    assert set(seen) == {written}
    assert contents(prepared.folder) == contents(Folder(data.parent / "prepared" / fingerprint))


@pytest.mark.processes
def test_killed_at_random_moments_it_computes_nothing_twice(s3: Bucket, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", pairs(300)))
    boto3.Session().client("s3").put_bucket_versioning(Bucket=s3.name, VersioningConfiguration={"Status": "Enabled"})
    stores = []

    def ended(number: int) -> None:
        names = {key.split("/")[1] for key in s3.objects() if key.startswith(f"prepared-{number}/")}
        # A process killed after the manifest and before its lease's end leaves the record, which nobody waits for.
        (name,) = (name for name in names if not name.endswith(".lease"))
        stores.append(contents(Folder(s3.uri(f"prepared-{number}/{name}"))))
        assert stores[-1] == stores[0]
        staged = {key: times for key, times in versions(s3).items() if key.startswith(f"prepared-{number}/{name}/staging/0")}
        assert len(staged) == 30 and set(staged.values()) == {1}

    kill_and_start_again(prepare_there, lambda number: (s3.variables, s3.uri(f"prepared-{number}"), path, 10), ended)
    assert len(stores) > 1


def test_a_manifest_that_names_what_is_not_there(s3: Bucket, data: Path, tokenizer: Any) -> None:
    prepared = prepare_here(cfg := there(data, s3.uri("prepared")), tokenizer, rows_per_part=10)
    gone, changed = prepared.parts("train")[:2]
    store = prepared.folder
    flipped = bytearray(store.read_bytes(changed))
    flipped[-300] ^= 1
    store.write_bytes(changed, bytes(flipped))
    with pytest.raises(UserError, match=f"doesn't hold what was prepared: {changed}: was changed: its sha256 is"):
        prepared.read()
    store.delete(gone)
    message = rf"dataset_prepared_path: {prepared.path} doesn't hold what was prepared: {gone}: is missing; delete the folder"
    with pytest.raises(UserError, match=message):
        prepare_here(cfg, tokenizer, rows_per_part=10)
    with pytest.raises(UserError, match=message):
        prepared.read("train", ["prompt_length"])
    manifest = json.loads(store.read("manifest.json") or "")
    store.write_json("manifest.json", {**manifest, "files": []})
    with pytest.raises(UserError, match="manifest.json isn't what was written there"):
        open_store(prepared.path)


@pytest.mark.parametrize(
    ("uri", "variables", "message"),
    [
        ("s3://no-such-bucket/prepared", {}, "can't be written: Bucket 'no-such-bucket' not found"),
        ("s3://{bucket}/prepared", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "can't be written: .*AWS Error.*keys are read from"),
        ("s3://{bucket}/prepared", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "can't be written: .*AWS Error NETWORK_CONN"),
        ("s3://key:secret@{bucket}/prepared", {}, "the URI holds a key"),
        ("nope://{bucket}/prepared", {}, "cannot open 'nope://.*': Protocol not known: nope"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_said_before_anything_starts(
    s3: Bucket,
    data: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    uri: str,
    variables: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setattr("pipeline.data.preparation.make_plan", None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^dataset_prepared_path: .*{message}"):
        prepare_here(there(data, uri.format(bucket=s3.name)), tokenizer)


def test_who_may_only_read_uses_what_is_complete(
    s3: Bucket, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = there(data, s3.uri("prepared"))
    prepared = prepare_here(cfg, tokenizer)
    objects = s3.objects()
    for name, value in s3.reader.items():
        monkeypatch.setenv(name, value)
    assert prepare_here(cfg, tokenizer, executor=None) == prepared
    assert prepared.read("train").num_rows == prepared.train_rows
    for other in (there(data, s3.uri("prepared"), sequence_len=99), there(data, s3.uri("elsewhere"))):
        with pytest.raises(UserError, match=r"^dataset_prepared_path: .* can't be written: .*ACCESS_DENIED during PutObject"):
            prepare_here(other, tokenizer)
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    assert s3.objects() == objects


def test_two_versions_of_the_code_have_stores_of_their_own(
    s3: Bucket, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = there(data, s3.uri("prepared"))
    old = prepare_here(cfg, tokenizer)
    before = contents(old.folder)
    with monkeypatch.context() as later:
        later.setattr("pipeline.data.plan.FORMAT_VERSION", FORMAT_VERSION + 1)
        new = prepare_here(cfg, tokenizer)
    assert new.fingerprint != old.fingerprint and contents(old.folder) == before
    assert prepare_here(cfg, tokenizer, executor=None) == old
    old.folder.write_bytes("manifest.json", new.folder.read_bytes("manifest.json"))
    with pytest.raises(UserError, match=r"manifest.json isn't what was written there; delete the folder"):
        prepare_here(cfg, tokenizer)


def test_a_bucket_that_goes_away_keeps_what_was_complete(
    own_s3: S3Server, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystems, "S3_ATTEMPTS", 2)
    cfg = there(data, own_s3.uri("prepared"))
    seen: list[dict[str, Any]] = []

    def away_after_three(state: dict[str, Any]) -> None:
        seen.append(state)
        if len(seen) == 3:
            own_s3.stop()

    with pytest.raises(
        UserError, match=r"^dataset_prepared_path: s3://.* can't be reached: .*AWS Error.*; what was complete stays"
    ):
        prepare_here(cfg, tokenizer, away_after_three, rows_per_part=10)
    own_s3.start()
    staged = {key: own_s3.content(key) for key in own_s3.objects() if "/staging/" in key}
    assert len(staged) == 3
    prepared = prepare_here(cfg, tokenizer, rows_per_part=10)
    assert contents(prepared.folder) == contents(
        prepare_here(there(data, str(data.parent / "prepared")), tokenizer, rows_per_part=10).folder
    )
