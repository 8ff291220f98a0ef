"""What may stand for RUN|MODEL, and what is said of everything else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.resolve_models import find_subject


@pytest.fixture
def copied(finished_adapter: Any, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    return Path(shutil.copytree(finished_adapter.run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))


def test_a_run_is_compared_with_what_it_started_from(adapter_run: Any, full_run: Any, tiny_base: str) -> None:
    adapter, full = find_subject(str(adapter_run.run_dir)), find_subject(str(full_run.run_dir))
    assert adapter.reference_name == full.reference_name == tiny_base
    assert (adapter.policy.lora_model_dir, adapter.policy.base_model) == (str(adapter_run.model_dir), tiny_base)
    assert full.policy.reference_model == str(full_run.model_dir)
    assert (adapter.beta, full.beta) == (0.2, 2.0)
    assert adapter.rewards_need_reference and not full.rewards_need_reference
    assert adapter.prepared == full.prepared is not None


def test_what_is_no_run_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder: '.*nothing'.*; give the output_dir of a run, the folder of a model"):
        find_subject(str(tmp_path / "nothing"))
    with pytest.raises(
        UserError, match=r"is no run, model or adapter \(no run.json, config.json or adapter_config.json in it\)"
    ):
        find_subject(str(tmp_path))
    with pytest.raises(UserError, match="no such folder: 'nothing'; give .* a hub id"):
        find_subject("nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model's config and no weights"):
        find_subject(str(tmp_path))
    (tmp_path / "model.gguf").write_text("no model")
    with pytest.raises(UserError, match="model.gguf' is no GGUF file; give"):
        find_subject(str(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match="--reference: no such folder"):
        find_subject("owner/name", reference="./nothing")


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"names no base model \(base_model_name_or_path\)"):
        find_subject(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json is broken: .*; put a whole one there"):
        find_subject(str(tmp_path))


@pytest.mark.main_job
def test_a_run_that_has_not_finished(copied: Path) -> None:
    state = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**state, "status": "started"}))
    with pytest.raises(UserError, match="has not finished: no checkpoint was complete yet; finish it with `prefray train"):
        find_subject(str(copied))


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("name", "message"), [("model", "has not finished"), ("config.yaml", "is incomplete: config.yaml is missing")]
)
def test_a_run_folder_that_is_incomplete(copied: Path, name: str, message: str) -> None:
    (copied / name).rename(copied / "gone")
    with pytest.raises(UserError, match=message):
        find_subject(str(copied))


@pytest.mark.main_job
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json is broken"),
        ("[]", "run.json is broken: it says no status"),
        ("{}", "run.json is broken: it says no status"),
        ('{"status": "finished"}', "run.json is broken: it says no prepared and no step"),
    ],
)
def test_a_run_json_that_is_broken(copied: Path, text: str, message: str) -> None:
    (copied / "run.json").write_text(text)
    with pytest.raises(UserError, match=message):
        find_subject(str(copied))


@pytest.mark.main_job
def test_a_model_folder_without_a_model(copied: Path) -> None:
    for file in (copied / "model").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="is incomplete: model/ holds no model"):
        find_subject(str(copied))


def test_a_sweep_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"status": "finished"}')
    with pytest.raises(UserError, match="holds a sweep; give one of its trials"):
        find_subject(str(tmp_path))
