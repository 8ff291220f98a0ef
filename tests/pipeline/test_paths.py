"""Workers run in folders of their own, so what is a path becomes absolute, and what isn't stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import parse_config
from pipeline.config.paths import absolute_paths


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    cfg = absolute_paths(
        parse_config(
            {
                "base_model": "model",
                "reference_model": "owner/name",
                "tokenizer_config": "pkg://package/file.gguf",
                "chat_template": "jinja",
                "chat_template_jinja": "{{ messages }}" * 100,
                "datasets": [{"path": "pairs.jsonl"}],
                "output_dir": "out",
            }
        )
    )
    assert cfg.base_model == str(tmp_path / "model")
    assert cfg.output_dir == str(tmp_path / "out")
    assert cfg.dataset_prepared_path == str(tmp_path / "last_run_prepared")
    assert (cfg.reference_model, cfg.tokenizer_config) == ("owner/name", "pkg://package/file.gguf")
    assert cfg.chat_template_jinja == "{{ messages }}" * 100
    assert cfg.datasets[0].path == "pairs.jsonl"


def test_a_uri_of_the_run_stays_and_one_of_this_machine_becomes_a_path() -> None:
    keys = {"base_model": "m", "datasets": [{"path": "a"}]}
    assert absolute_paths(parse_config({**keys, "output_dir": "s3://bucket/run"})).output_dir == "s3://bucket/run"
    assert absolute_paths(parse_config({**keys, "output_dir": "file:///runs/one"})).output_dir == "/runs/one"
    cfg = absolute_paths(parse_config({**keys, "dataset_prepared_path": "gs://bucket/prepared"}))
    assert cfg.dataset_prepared_path == "gs://bucket/prepared"


def test_models_at_uris_stay_and_those_of_this_machine_become_paths() -> None:
    keys = {"base_model": "file:///models/one", "reference_model": "s3://bucket/two", "datasets": [{"path": "a"}]}
    cfg = absolute_paths(parse_config(keys))
    assert (cfg.base_model, cfg.reference_model) == ("/models/one", "s3://bucket/two")


def test_models_at_uris_are_found_whatever_the_case_of_their_scheme() -> None:
    keys = {"base_model": "S3://bucket/Model", "datasets": [{"path": "a"}], "rl": "grpo", "output_dir": "o"}
    rewards = ["S3://bucket/reward", "file:///reward", "module.function", "owner/name"]
    cfg = absolute_paths(
        parse_config({**keys, "reference_model": "FILE:///model", "trl": {"beta": 0.1, "reward_funcs": rewards}})
    )
    assert (cfg.base_model, cfg.reference_model) == ("s3://bucket/Model", "/model")
    assert cfg.trl is not None
    assert cfg.trl.reward_funcs == ["s3://bucket/reward", "/reward", "module.function", "owner/name"]
