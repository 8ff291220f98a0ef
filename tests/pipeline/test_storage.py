"""Paths and URIs: found, written whole, read again, by whoever is meant to."""

from __future__ import annotations

import http.server
import pickle
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import boto3
import pyarrow as pa
import pytest
from pyarrow import fs

from pipeline.config import parse_config
from pipeline.config.paths import absolute_paths
from pipeline.data.sources.filesystem import File, list_files
from pipeline.data.store import prepared_root
from pipeline.errors import UserError
from pipeline.io.filesystems import RetryingS3
from pipeline.io.storage import Folder, Location, inside, locate, reason
from pipeline.runs.folder import RunFolder
from tests.s3 import Bucket


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A folder that isn't there yet, on a disk, on fsspec and on S3."""
    where: Location = tmp_path / "run"
    if request.param == "memory":
        where = f"memory://{uuid.uuid4().hex}/run"
    if request.param == "s3":
        where = request.getfixturevalue("s3").uri("run")
    return Folder(where)


def test_a_folder_that_is_not_there(folder: Folder) -> None:
    assert (folder.names(), folder.read("run.json"), folder.has_folder("model")) == ([], None, False)
    folder.delete("model")


def test_files_are_written_and_written_anew(folder: Folder) -> None:
    folder.create()
    folder.write("run.json", "{}")
    folder.write("run.json", '{"läuft": 1}')
    assert folder.read("run.json") == '{"läuft": 1}'
    assert folder.names() == ["run.json"]


def test_files_and_folders_are_deleted(folder: Folder) -> None:
    folder.create()
    folder.write("run.json", "{}")
    Folder(inside(folder.where, "model")).create()
    Folder(inside(folder.where, "model")).write("config.json", "{}")
    assert folder.has_folder("model") and not folder.has_folder("run.json")
    folder.delete("model")
    assert folder.names() == ["run.json"]
    folder.delete("run.json")
    assert folder.names() == []


def test_json_that_is_broken_is_said(folder: Folder) -> None:
    folder.create()
    assert folder.read_json("run.json") is None
    folder.write("run.json", '{"step": 1}')
    assert folder.read_json("run.json") == {"step": 1}
    folder.write("run.json", '{"step"')
    with pytest.raises(UserError, match=r"run.json is broken: Expecting.*; put a whole one there, or give another folder"):
        folder.read_json("run.json")


def test_a_local_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("run.json", "old")
    (tmp_path / ".run.json.partial").mkdir()
    with pytest.raises(OSError, match="run.json.partial"):
        folder.write("run.json", "new")
    assert folder.read("run.json") == "old"


def test_where_things_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("runs/a") == tmp_path / "runs" / "a"
    assert locate("file:///runs/a%20b") == Path("/runs/a b")
    assert locate("s3://bucket/run?region=x") == "s3://bucket/run?region=x"
    assert inside(Path("/run"), "model") == Path("/run/model")
    assert inside("s3://bucket/run", "model") == "s3://bucket/run/model"
    assert inside("s3://bucket/run/?region=x", "model") == "s3://bucket/run/model?region=x"


def test_a_file_uri_is_a_path_of_this_machine(tmp_path: Path) -> None:
    """As it is written where something has that name, whatever letters it has."""
    assert locate("file:///runs/a%20%23b") == Path("/runs/a #b")
    for name in ("a b", "50%", "a#b", "wha?t", "\u00e9[x]", "a%20b"):
        (tmp_path / name).mkdir()
        assert locate(f"file://{tmp_path}/{name}") == tmp_path / name
    with pytest.raises(UserError, match="'file://tmp/x' names a machine, 'tmp'; a path on this one has three slashes"):
        locate("file://tmp/x")


ODD = ("a b", "a#b", "50%", "a%20b", "\u00e9", "[x]", "a+b=c&d")


@pytest.mark.parametrize("name", ODD)
def test_letters_that_uris_do_not_have(name: str, s3: Bucket) -> None:
    """`#` isn't the end, and what a store lists can be read again under the name that it has there."""
    folder = Folder(s3.uri(f"run {name}"))
    folder.write("run.json", "{}")
    written = name.replace("%20", " ")
    assert s3.objects() == [f"run {written}/run.json"] and folder.names() == ["run.json"]
    assert Folder(s3.uri("run " + quote(written))).read("run.json") == "{}"
    (listed,) = list_files(s3.uri(f"run {name}")).values()
    assert File(listed).info().type == fs.FileType.File


def test_names_of_files_in_a_bucket_may_have_any_letters(s3: Bucket) -> None:
    client = boto3.Session().client("s3")
    for name in (*ODD, "q?x"):
        client.put_object(Bucket=s3.name, Key=f"data/{name}.jsonl", Body=b"{}")
    found = list_files(s3.uri("data"))
    assert sorted(found) == sorted(f"{name}.jsonl" for name in (*ODD, "q?x"))
    assert all(File(where).info().type == fs.FileType.File for where in found.values())


def test_another_process_gets_the_keys_and_the_patience_of_this_one(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(s3.uri("run"))
    folder.create()
    folder.write("run.json", "{}")
    sent = pickle.dumps(folder.for_other_processes())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    assert s3.variables["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    received = pickle.loads(sent)
    assert isinstance(received, RetryingS3)
    assert received.get_file_info(f"{s3.name}/run/run.json").type == fs.FileType.File


def test_keys_of_a_profile_stay_where_they_are(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node looks for itself, so that keys that change are read anew."""
    secret = "not-to-be-sent"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    assert secret.encode() not in pickle.dumps(Folder(s3.uri("run")).for_other_processes())


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/run?regoin=us-east-1", "Unexpected query parameter in S3 URI: 'regoin'"),
        ("s3:///run", "Missing bucket name in S3 URI"),
    ],
)
def test_a_uri_that_is_wrong_is_not_for_another_package(uri: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^cannot open '{re.escape(uri)}': {reason}$"):
        Folder(uri)


@pytest.mark.parametrize("uri", ["s3://bucket/../run", "s3://bucket/./run", "gs://bucket/run/.."])
def test_a_store_has_no_folder_above(uri: str) -> None:
    """Servers don't resolve them as clients do, and would say that the keys are wrong."""
    with pytest.raises(
        UserError, match=f"^cannot open '{re.escape(uri)}': a store has no folders '.' and '..'; write the name"
    ):
        Folder(uri)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (" ", "must name a folder, got ' '"),
        ("s3:/bucket/x", "'s3:/bucket/x' has one slash after its scheme; a URI has two: s3://bucket/folder"),
        ("s3:bucket/x", "'s3:bucket/x' has no slash after its scheme; a URI has two: s3://bucket/folder"),
        ("HTTP://host/x", "'http://host/x' is a web address, where nothing can be written; give a path, or the URI of a store"),
        (
            "memory://x",
            "'memory://x' is the memory of one process; give a path, or the URI of a store",
        ),
    ],
)
@pytest.mark.parametrize("key", ["output_dir", "dataset_prepared_path"])
def test_where_nothing_can_be_kept(key: str, where: str, message: str) -> None:
    def open_both() -> None:
        cfg = absolute_paths(parse_config({"base_model": "x", "rl": "dpo", "datasets": [{"path": "x.jsonl"}], key: where}))
        prepared_root(cfg.dataset_prepared_path)
        RunFolder(locate(cfg.output_dir))

    with pytest.raises(UserError, match=f"^{key}: {re.escape(message)}$"):
        open_both()


def test_an_unknown_scheme() -> None:
    with pytest.raises(UserError, match="cannot open 'nope://x/run': Protocol not known: nope"):
        Folder("nope://x/run")


def test_errors_of_fsspecs_clients_are_those_of_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever class they have: when it is opened, asked, and read."""
    from fsspec.implementations.local import LocalFileOpener

    from tests.leases import SharedFileSystem

    class ClientError(Exception):
        pass

    def fail(*_: object, **__: object) -> None:
        raise ClientError("500")

    (tmp_path / "a").write_text("x")
    folder = pickle.loads(pickle.dumps(Folder(f"shared://{tmp_path}")))
    assert folder.read("a") == "x" and folder.names() == ["a"]
    with monkeypatch.context() as patch:
        patch.setattr(LocalFileOpener, "read", fail)
        with pytest.raises(OSError, match="^ClientError: 500$"):
            folder.read("a")
    monkeypatch.setattr(SharedFileSystem, "info", fail)
    with pytest.raises(OSError, match="^ClientError: 500$"):
        folder.read("a")
    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    with pytest.raises(UserError, match="cannot open 'shared:///b': 500"):
        Folder("shared:///b")


def test_a_bucket_that_does_not_exist(s3: Bucket) -> None:
    with pytest.raises(OSError, match="Bucket 'none' not found") as error:
        Folder("s3://none/run").create()
    assert reason(error.value).startswith("Bucket 'none' not found. To create buckets")


class Denied(http.server.BaseHTTPRequestHandler):
    """Answers as Amazon does to those who have no keys."""

    def do_GET(self) -> None:
        body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A URI of a store that lets nobody in."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Denied)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"s3://bucket/run?scheme=http&endpoint_override=127.0.0.1:{server.server_port}"
    server.shutdown()


def test_without_keys(denied: str) -> None:
    with pytest.raises(OSError, match="ACCESS_DENIED") as error:
        Folder(denied).names()
    assert "Access Denied" in reason(error.value)
    assert "S3's keys are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws" in reason(error.value)


def test_reasons_are_one_line() -> None:
    assert (
        reason(NotADirectoryError(20, "Cannot create directory '/a'. Detail: [errno 20] Not a directory")) == "Not a directory"
    )
    assert reason(OSError("first\nsecond")) == "first"
    assert reason(NotImplementedError()) == "it can't be written"
    assert reason(OSError("it is gone (Request ID: abc)")) == "it is gone"
    moved = "AWS Error UNKNOWN (HTTP status 301) during HeadBucket operation: No response body."
    assert reason(OSError(moved)).startswith(f"the bucket is in another region: {moved} (S3's keys are read from")
    skewed = "AWS Error REQUEST_TIME_TOO_SKEWED during GetObject operation: The difference is too large."
    assert reason(OSError(skewed)).startswith("this machine's clock differs from the store's: AWS Error")


def test_tables_are_the_same_bytes_wherever_they_are_written(folder: Folder, tmp_path: Path) -> None:
    table = pa.table({"row_id": [1, 2, 3], "ids": [[1], [], [2, 3]]})
    written = folder.write_table("train/part-0.parquet", table)
    other = Folder(tmp_path / "other")
    assert written == other.write_table("part-0.parquet", table) and written["bytes"] == folder.size("train/part-0.parquet")
    assert folder.read_bytes("train/part-0.parquet") == other.read_bytes("part-0.parquet")
    assert folder.read_table("train/part-0.parquet").equals(table)
    assert folder.read_table("train/part-0.parquet", ["ids"]).equals(table.select(["ids"]))
    assert folder.column_names("train/part-0.parquet") == ["row_id", "ids"]
    folder.write_json("a.json", {})
    assert folder.files() == {"train/part-0.parquet": written["bytes"], "a.json": 3}
    assert folder.files("train") == {"train/part-0.parquet": written["bytes"]}
    assert folder.subfolder("train").files() == {"part-0.parquet": written["bytes"]}
    assert folder.exists("a.json") and not folder.exists("train") and folder.modified("a.json") is not None
    assert (folder.size("b.json"), folder.modified("b.json"), folder.files("eval")) == (None, None, {})
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("b.json")


def test_pages_with_checksums_are_compared(folder: Folder) -> None:
    folder.write_table("a.parquet", pa.table({"row_id": range(5000)}), checksums=True)
    flipped = bytearray(folder.read_bytes("a.parquet"))
    flipped[len(flipped) // 2] ^= 1
    folder.write_bytes("a.parquet", bytes(flipped))
    with pytest.raises((OSError, pa.ArrowException)):
        folder.read_table("a.parquet")
