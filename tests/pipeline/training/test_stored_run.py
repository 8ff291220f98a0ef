"""A run's folder on an object store: what it leaves, what it refuses, and what it does while the store is away."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow import fs
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import RunConfig, dump_config, parse_config
from pipeline.errors import RunFailed, UserError
from pipeline.io import retry as patience
from pipeline.io.storage import Folder
from pipeline.runs import checkpoints
from pipeline.runs import jsonl as lines
from pipeline.runs.checkpoints import copy_file, rotate, store
from pipeline.runs.export import SyncFoldersCallback, put_model
from pipeline.runs.folder import RunFolder
from pipeline.runs.metrics import MetricsFile
from tests.s3 import S3Server
from tests.waiting import wait_for

MANIFEST = "manifest-00000-of-00001.json"


def config(**keys: object) -> RunConfig:
    return parse_config({"base_model": "m", "datasets": [{"path": "a"}], **keys})


@pytest.fixture
def folder(own_s3: S3Server) -> RunFolder:
    return RunFolder(own_s3.uri("runs/one"))


def stop_after(folder: RunFolder, *steps: int) -> None:
    """Leave what a run leaves that stopped after checkpoints at `steps`."""
    for step in steps:
        Folder(f"{folder.path}/checkpoint-{step:06d}").write(MANIFEST, "{}")


def test_a_new_run_writes_its_config(folder: RunFolder, own_s3: S3Server) -> None:
    folder.open(config(rl_beta=0.3), resume=False)
    assert own_s3.objects() == ["runs/one/config.yaml", "runs/one/run.json"]
    assert "rl_beta: 0.3" in (folder.storage.read("config.yaml") or "")
    assert folder.metrics == own_s3.uri("runs/one/metrics.jsonl")


def test_a_stopped_run_is_refused_and_continued(folder: RunFolder) -> None:
    folder.open(config(rl_beta=0.1), resume=False)
    folder.start("data", 12)
    stop_after(folder, 5, 10)
    with pytest.raises(UserError, match="'s3://bucket/runs/one' holds a run stopped after step 10; continue it with --resume"):
        folder.open(config(rl_beta=0.1), resume=False)
    with pytest.raises(UserError, match="other settings.*\n  rl_beta: was 0.1, is 0.2"):
        folder.open(config(rl_beta=0.2), resume=True)
    RunFolder(folder.path).open(config(rl_beta=0.1, num_epochs=3), resume=True)
    assert folder.checkpoints() == [5, 10]
    with pytest.raises(UserError, match="the data have changed"):
        folder.start("other data", 12)


def test_old_checkpoints_are_deleted(folder: RunFolder, own_s3: S3Server) -> None:
    folder.open(config(), resume=False)
    stop_after(folder, 5, 10, 15)
    rotate(folder.storage.filesystem, folder.storage.path, "checkpoint-000015", limit=2, best=5)
    assert own_s3.objects() == [
        f"runs/one/checkpoint-000005/{MANIFEST}",
        f"runs/one/checkpoint-000015/{MANIFEST}",
        "runs/one/config.yaml",
        "runs/one/run.json",
    ]


def test_a_finished_run_is_refused(folder: RunFolder) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12)
    folder.finish(12, None)
    assert folder.finished_steps() is None  # no model
    Folder(f"{folder.path}/model").write("config.json", "{}")
    with pytest.raises(UserError, match="holds a finished run of 12 steps"):
        folder.open(config(), resume=False)


def test_what_is_not_a_run_is_left_alone(folder: RunFolder, own_s3: S3Server) -> None:
    folder.storage.write("thesis.tex", "mine")
    with pytest.raises(UserError, match="'s3://bucket/runs/one' is not empty \\(thesis.tex\\) and holds no run"):
        folder.open(config(), resume=False)
    assert own_s3.objects() == ["runs/one/thesis.tex"]


def test_what_cannot_be_continued_is_cleared(folder: RunFolder, own_s3: S3Server) -> None:
    folder.open(config(), resume=False)
    Folder(f"{folder.path}/checkpoint-000005").write("optimizer.pt", "half")
    folder.storage.write("metrics.jsonl", '{"step": 1}\n')
    folder.open(config(rl_beta=0.2), resume=False)
    assert own_s3.objects() == ["runs/one/config.yaml", "runs/one/run.json"]


@pytest.mark.parametrize(
    ("output_dir", "message"),
    [
        ("nope://x/run", "output_dir: cannot open 'nope://x/run': Protocol not known: nope"),
        ("s3://bucket", "output_dir: 's3://bucket' is a whole store or bucket; give a folder in it"),
        ("s3://name:secret@bucket/run", "output_dir: the URI holds a key, and is written to config.yaml"),
    ],
)
def test_uris_that_lead_nowhere(own_s3: S3Server, output_dir: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunFolder(output_dir)


def test_a_store_that_does_not_answer(own_s3: S3Server) -> None:
    own_s3.stop()
    with pytest.raises(UserError, match="output_dir: 's3://bucket/run' can't be written: .*Could not connect to server"):
        RunFolder(own_s3.uri("run")).open(config(), resume=False)
    own_s3.start()


def test_a_bucket_that_does_not_exist(own_s3: S3Server) -> None:
    with pytest.raises(UserError, match="output_dir: 's3://none/run' can't be written: Bucket 'none' not found"):
        RunFolder("s3://none/run").open(config(), resume=False)


def test_keys_that_are_wrong(own_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(UserError, match="'s3://bucket/run' can't be written: .*INVALID_ACCESS_KEY_ID.*AWS_ACCESS_KEY_ID and"):
        RunFolder(own_s3.uri("run")).open(config(), resume=False)


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output_dir: 'http://127.0.0.1:9/run' is a web address, where nothing can be"):
        RunFolder("http://127.0.0.1:9/run").open(config(), resume=False)


def test_the_command_ends_with_status_2(tmp_path: Path, tiny_base: str) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    cfg = config(base_model=tiny_base, datasets=[{"path": str(tmp_path / "pairs.jsonl")}], output_dir="nope://x/run")
    (tmp_path / "recipe.yaml").write_text(dump_config(cfg))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "recipe.yaml"), "--quiet"])
    assert result.exit_code == 2
    assert "prefray: output_dir: cannot open 'nope://x/run'" in result.stderr


def test_metrics_are_rewritten_now_and_then(own_s3: S3Server) -> None:
    metrics = MetricsFile(own_s3.uri("metrics.jsonl"))
    metrics.append([{"step": 1}])
    metrics.append([{"step": 2}])
    assert [record["step"] for record in MetricsFile(metrics.path).read()] == [1]
    metrics.flush()
    assert [record["step"] for record in MetricsFile(metrics.path).read()] == [1, 2]


def test_metrics_are_rewound(own_s3: S3Server) -> None:
    metrics = MetricsFile(own_s3.uri("metrics.jsonl"))
    metrics.append([{"step": step, "loss": 1.0} for step in (1, 2, 3)])
    again = MetricsFile(metrics.path)
    again.rewind(2)
    again.append([{"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}])
    again.flush()
    assert MetricsFile(metrics.path).read() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5}]


def test_metrics_wait_while_the_store_is_away(own_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "REWRITE_INTERVAL_S", 0.0)
    monkeypatch.setattr(lines, "SHARE_OF_TIME", float("inf"))
    metrics = MetricsFile(own_s3.uri("metrics.jsonl"))
    metrics.append([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}])
    own_s3.stop()
    metrics.rewind(1)
    metrics.append([{"step": 2, "loss": 0.5}])
    with pytest.raises(OSError, match="Could not connect"):
        metrics.flush()
    own_s3.start()
    metrics.append([{"step": 3, "loss": 0.4}])
    assert [record["loss"] for record in MetricsFile(metrics.path).read()] == [1.0, 0.5, 0.4]


def away_until_missed(own_s3: S3Server, caplog: pytest.LogCaptureFixture) -> threading.Thread:
    """The store stops now, and is there again when a request to it has failed twice."""
    own_s3.stop()

    def come_back() -> None:
        try:
            wait_for(lambda: caplog.text.count("failed and is tried again") >= 2)
        finally:
            own_s3.start()

    thread = threading.Thread(target=come_back)
    thread.start()
    return thread


def test_run_json_waits_while_the_store_is_away(folder: RunFolder, own_s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    folder.open(config(), resume=False)
    folder.start("data", 12)
    returning = away_until_missed(own_s3, caplog)
    folder.finish(12, None)
    returning.join()
    assert (folder.state() or {})["status"] == "finished"


def test_a_run_ends_when_its_store_stays_away(folder: RunFolder, own_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_TIMEOUT_S", 0.0)
    folder.open(config(), resume=False)
    own_s3.stop()
    assert "'s3://bucket/runs/one' can't be read now: " in folder.remains()
    monkeypatch.setattr(RunFolder, "check", lambda *_: None)
    with pytest.raises(RunFailed, match="run.json can't be read: .*Could not connect"):
        folder.start("data", 12)
    monkeypatch.setattr(RunFolder, "known", lambda _: {"id": "known"})
    with pytest.raises(RunFailed, match="run.json can't be written: .*Could not connect"):
        folder.start("data", 12)
    own_s3.start()


def test_a_checkpoint_is_stored_when_the_store_is_back(
    own_s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "optimizer.pt").write_bytes(bytes(range(256)) * 80_000)
    (tmp_path / "rng_state_0.pth").write_bytes(b"random")
    (tmp_path / MANIFEST).write_text("{}")
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=1)
    filesystem = fs.S3FileSystem(endpoint_override=own_s3.variables["AWS_ENDPOINT_URL"], retry_strategy=retries)
    returning = away_until_missed(own_s3, caplog)
    store(tmp_path, filesystem, "bucket/run/checkpoint-000005")
    returning.join()
    assert "storing bucket/run/checkpoint-000005/optimizer.pt failed and is tried again" in caplog.text
    assert [key.rpartition("/")[2] for key in own_s3.objects()] == [MANIFEST, "optimizer.pt", "rng_state_0.pth"]
    with filesystem.open_input_stream("bucket/run/checkpoint-000005/optimizer.pt") as file:
        assert file.read() == (tmp_path / "optimizer.pt").read_bytes()


def saved(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_text(f"{folder.name}/{name}")
    return folder


def test_a_model_takes_the_place_of_another(own_s3: S3Server, tmp_path: Path) -> None:
    filesystem, run = Folder(own_s3.uri("run")).for_other_processes(), "bucket/run"
    put_model(saved(tmp_path / "old", "config.json", "model-00001-of-00002.safetensors"), filesystem, run)
    put_model(saved(tmp_path / "new", "config.json", "model.safetensors"), filesystem, run)
    assert own_s3.objects() == ["run/model/config.json", "run/model/model.safetensors"]
    assert Folder(own_s3.uri("run/model")).read("config.json") == "new/config.json"


def test_on_a_path_the_old_model_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, run = fs.LocalFileSystem(), tmp_path / "run"
    put_model(saved(tmp_path / "old", "config.json", "model.safetensors"), filesystem, str(run))
    new = saved(tmp_path / "new", "config.json", "model.safetensors")

    def full(file: Path, *where: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "copy_file", full)
        with pytest.raises(OSError, match="full"):
            put_model(new, filesystem, str(run))
    assert (run / "model" / "config.json").read_text() == "old/config.json"
    put_model(new, filesystem, str(run))
    assert (run / "model" / "config.json").read_text() == "new/config.json"
    assert [path.name for path in run.iterdir()] == ["model"]


def test_half_a_model_does_not_look_like_one(own_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, run = Folder(own_s3.uri("run")).for_other_processes(), "bucket/run"
    put_model(saved(tmp_path / "old", "config.json", "model.safetensors"), filesystem, run)
    new = saved(tmp_path / "new", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json")

    def full_after_weights(file: Path, *where: object) -> None:
        if file.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "full")
        copy_file(file, *where)

    monkeypatch.setattr(checkpoints, "copy_file", full_after_weights)
    with pytest.raises(OSError, match="full"):
        put_model(new, filesystem, run)
    assert own_s3.objects() == ["run/model/adapter_model.safetensors"]


def test_what_is_watched_is_copied_once_it_is_new(own_s3: S3Server, tmp_path: Path) -> None:
    filesystem = Folder(own_s3.uri("run")).filesystem
    mirror, rank_zero = (
        SyncFoldersCallback(tmp_path, ["generations"], filesystem, "bucket/run"),
        SimpleNamespace(is_local_process_zero=True),
    )
    mirror.on_evaluate(None, SimpleNamespace(is_local_process_zero=False), None)
    mirror.on_save(None, rank_zero, None)
    (tmp_path / "generations").mkdir()
    (tmp_path / "generations" / "step-000004.jsonl").write_text("{}\n")
    mirror.on_evaluate(None, rank_zero, None)
    assert own_s3.objects() == ["run/generations/step-000004.jsonl"]
    filesystem.delete_file("bucket/run/generations/step-000004.jsonl")
    (tmp_path / "generations" / "step-000008.jsonl").write_text("{}\n")
    own_s3.stop()
    mirror.on_evaluate(None, rank_zero, None)
    own_s3.start()
    mirror.on_train_end(None, rank_zero, None)
    assert own_s3.objects() == ["run/generations/step-000008.jsonl"]
