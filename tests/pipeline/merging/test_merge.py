"""`prefray merge`: a real run and adapters in folders become models, or a message says why not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from pipeline import TrainResult, merge, train
from pipeline.cli import app
from pipeline.config import parse_config
from pipeline.doctor.machine import Machine
from pipeline.errors import RunFailed, UserError
from pipeline.io.storage import Folder
from pipeline.merging import merge as merging
from pipeline.ui.display import SilentDisplay
from tests.s3 import Bucket
from tests.strategies.merging import change
from tests.tiny import adapter_folder, pairs, save_tiny

runner = CliRunner()


class Recorder(SilentDisplay):
    """A display that keeps what it is shown, and may be told to do something at a stage."""

    def __init__(self, at: str = "", action: Any = None) -> None:
        self.stages: list[str] = []
        self.notes: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self._at, self._action = at, action

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)
        if self._action is not None and name.startswith(self._at):
            self._action()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, state: dict[str, Any]) -> None:
        self.steps.append(state)


@pytest.fixture(scope="module")
def run(ray_session: Any, tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of an adapter and a new token, its embeddings grown, on real Ray."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs(20)))
    keys = {
        "base_model": tiny_base,
        "datasets": [{"path": str(folder / "pairs.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 6,
        "adapter": "lora",
        "lora_r": 4,
        "tokens": ["<think>"],
        "learning_rate": 1e-2,
        "max_steps": 3,
        "save_strategy": "no",
        "output_dir": str(folder / "run"),
    }
    return train(parse_config(keys))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    folder = Path(adapter_folder(tmp_path / "adapter"))
    change(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_becomes_a_model(run: TrainResult, tiny_base: str) -> None:
    display = Recorder()
    result = merge(run.run_dir, display=display)
    assert result.path == run.run_dir / "merged"
    assert (result.tensors, result.merged, result.dtype) == (21, 16, "float32")  # 14 matrices, embedding and head
    assert display.stages == [
        "reading the base model and the adapter",
        "computing base and adapter on evaluation rows of the run",
        "merging",
        "verifying on evaluation rows of the run",
    ]
    assert [step["rows_done"] for step in display.steps] == 2 * list(range(1, 11)) and display.notes == []
    assert result.differences is not None and result.differences.sequences == 5  # four rows, and the new token
    assert result.differences.same_argmax == 1 and result.differences.logps.largest < 1e-5 < result.differences.adapter.rms
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}
    assert files <= names(result.path)
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 260
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    other = AutoModelForCausalLM.from_pretrained(tiny_base)
    other.resize_token_embeddings(260, mean_resizing=False)
    policy = PeftModel.from_pretrained(other, run.model_dir)
    ids = tokenizer("What is 1 plus 1? <think>", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == 259
    torch.testing.assert_close(model(ids).logits, policy(ids).logits, rtol=1e-4, atol=1e-5)
    assert "| Tensors changed | 16 of 21 |" in (result.path / "README.md").read_text()
    assert {path.name for path in run.run_dir.glob(".*merged*")} == set()
    with pytest.raises(UserError, match="--output: .*merged' exists; give another folder, or delete it"):
        merge(run.run_dir)


def test_a_merged_model_in_its_folder_doesnt_stop_a_run_from_going_on(run: TrainResult) -> None:
    (run.run_dir / "merged").mkdir(exist_ok=True)
    cfg = parse_config(yaml.safe_load((run.run_dir / "config.yaml").read_text()))
    assert train(cfg, resume=True).steps == run.steps


def test_the_command(adapter: Path, tmp_path: Path) -> None:
    options = ["--dtype", "bfloat16", "--shard-size", "100KB", "--quiet"]
    result = runner.invoke(app, ["merge", str(adapter), *options])
    assert result.exit_code == 0, result.stderr
    assert "4 of 21 changed, 0.2 MB, bfloat16" in result.stdout
    assert "what rounding explains" in result.stdout
    assert f"model    {tmp_path}/adapter-merged" in result.stdout
    assert "verifying on built-in sentences" in result.stderr
    assert "model-00003-of-00003.safetensors" in names(tmp_path / "adapter-merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "adapter-merged").dtype == torch.bfloat16
    again = runner.invoke(app, ["merge", str(adapter), "--output", str(tmp_path / "other"), "--no-verify"])
    assert again.exit_code == 0 and "not verified" in again.stderr and "explains" not in again.stdout
    assert "| Compared with base and adapter | no |" in (tmp_path / "other" / "README.md").read_text()


def test_a_base_that_is_somewhere_else(adapter: Path, base: Path, tmp_path: Path) -> None:
    base.rename(tmp_path / "moved")
    result = runner.invoke(app, ["merge", str(adapter)])
    assert result.exit_code == 2
    assert f"base_model: no such folder: '{base}'" in result.stderr
    assert "--base MODEL says where the base model is" in result.stderr
    assert merge(adapter, base=str(tmp_path / "moved"), verify=False).merged == 4
    change(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="doesn't say which base model the adapter belongs to; give it with --base"):
        merge(adapter, tmp_path / "other")


def test_a_merge_that_differs_is_deleted(adapter: Path, tmp_path: Path) -> None:
    """The file is damaged after it was written."""

    def spoil() -> None:
        file = tmp_path / ".adapter-merged.partial" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.5
        save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(RunFailed, match=r"differs from base and adapter: log-probabilities by up to .*; it was deleted"):
        merge(adapter, display=Recorder("verifying", spoil))
    assert names(tmp_path) == {"base", "adapter"}


@pytest.mark.parametrize("at", ["computing", "merging", "verifying"])
def test_an_interrupted_merge_leaves_nothing(adapter: Path, tmp_path: Path, at: str) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(adapter, display=Recorder(at, interrupt))
    assert names(tmp_path) == {"base", "adapter"}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        merge(adapter, display=Recorder(at, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert ended.value.code == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    assert names(tmp_path) == {"base", "adapter"}


def test_a_disk_that_is_full(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"--output: the merged model takes 0.4 MiB, and '.*' has room for 0.0 MiB; give another"
    ):
        merge(adapter)
    assert names(tmp_path) == {"base", "adapter"}


def test_a_disk_that_fills_up(adapter: Path, tmp_path: Path) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, most[1]))
    try:
        with pytest.raises(RunFailed, match=r"adapter-merged' can't be written, and nothing of it is left: .*File too large"):
            merge(adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert names(tmp_path) == {"base", "adapter"}


def test_a_machine_without_memory_for_the_model(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "machine_memory", lambda: Machine("CPU", 1 << 20, 1 << 20))
    with pytest.raises(
        UserError, match=r"merging takes 0.0 GiB of memory \(the whole model in float32\), and 0.0 GiB are free"
    ):
        merge(adapter)
    assert names(tmp_path) == {"base", "adapter"}


def test_a_place_that_cant_be_written(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(UserError, match="out.partial' is there: another merge writes it, or was killed; then delete it"):
        merge(adapter, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--output: .*file/out' can't be written: Not a directory"):
        merge(adapter, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dtype": "int8"}, "--dtype: must be one of float32, bfloat16, float16, got 'int8'"),
        ({"shard_size": "5"}, "--shard-size: must be a size such as 5GB or 500MB, got '5'"),
        ({"shard_size": "0GB"}, "--shard-size: must be a size such as 5GB or 500MB, got '0GB'"),
        ({"shard_size": 0}, "--shard-size: must be a size such as 5GB or 500MB, got 0"),
    ],
)
def test_wrong_options(adapter: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge(adapter, **keys)


def test_folders_that_hold_nothing_to_merge(base: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    for folder, message in (
        (
            tmp_path / "none",
            "is not there; give the output_dir of a finished run, or a folder with adapter_config",
        ),
        (tmp_path / "other", "holds no run and no adapter; give the output_dir"),
        (tmp_path / "sweep", "holds a sweep; give one of its trials"),
        (base, "holds a whole model, so there is nothing to merge"),
        (base / "config.json", "is a file; give the output_dir of a finished run"),
    ):
        with pytest.raises(UserError, match=message):
            merge(folder)


@pytest.fixture
def copied(finished_adapter: TrainResult, tmp_path: Path) -> Path:
    """A run's folder, to change."""
    ignore = shutil.ignore_patterns("checkpoint-*", ".*")
    return Path(shutil.copytree(finished_adapter.run_dir, tmp_path / "run", ignore=ignore))


@pytest.mark.main_job
def test_runs_that_cant_be_merged(copied: Path, tiny_base: str) -> None:
    shutil.move(copied / "config.yaml", copied / "kept.yaml")
    with pytest.raises(UserError, match="is incomplete: config.yaml is missing"):
        merge(copied)
    shutil.move(copied / "kept.yaml", copied / "config.yaml")
    shutil.copytree(tiny_base, copied / "whole")
    shutil.move(copied / "model", copied / "kept")
    with pytest.raises(UserError, match=r"has not finished: .*; finish it with `prefray train .*/run/config.yaml --resume`"):
        merge(copied)
    shutil.move(copied / "whole", copied / "model")
    with pytest.raises(UserError, match=r"trained all weights, so there is nothing to merge: its model is .*/run/model"):
        merge(copied)


@pytest.mark.main_job
def test_a_base_that_has_changed_since_the_run_began(copied: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "base", seed=1)
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**config, "base_model": other}))
    with pytest.raises(
        UserError, match="has changed: the run in .* began with the weights .*; put them back, or name with --base"
    ):
        merge(copied)
    display = Recorder()
    merge(copied, base=other, display=display, verify=False)
    assert display.notes[0] == f"--base: {other!r} isn't, file by file, what the run began with"


def test_a_quantized_run_is_merged_into_what_is_stored(copied: Path) -> None:
    """What the note says is what is done; training on quantized weights itself needs a GPU."""
    config = yaml.safe_load((copied / "config.yaml").read_text())
    (copied / "config.yaml").write_text(yaml.safe_dump({**config, "adapter": "qlora", "load_in_4bit": True}))
    state = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**state, "base": None}))
    display = Recorder()
    result = merge(copied, display=display)
    assert "the run trained on quantized weights of the base" in display.notes[0]
    assert result.differences is not None and result.dtype == "float32"


def test_at_uris(base: Path, adapter: Path, s3: Bucket, tmp_path: Path) -> None:
    """The base too, which the adapter names by its URI."""
    change(adapter / "adapter_config.json", base_model_name_or_path=s3.uri("base"))
    for file in base.iterdir():
        Folder(s3.uri("base")).write(file.name, file.read_bytes())
    for file in adapter.iterdir():
        Folder(s3.uri("adapter")).write(file.name, file.read_bytes())
    with pytest.raises(UserError, match="--output: must be given for an adapter at a URI"):
        merge(s3.uri("adapter"))
    result = merge(s3.uri("adapter"), s3.uri("merged"))
    assert result.path == s3.uri("merged")
    (tmp_path / "here").mkdir()
    s3.download("merged", str(tmp_path / "here"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "here").config.vocab_size == 259
    with pytest.raises(UserError, match="exists; give another folder"):
        merge(adapter, s3.uri("merged"))
