"""Workers run in folders of their own, so what is a path becomes absolute, and what isn't stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import parse_config
from pipeline.paths import absolute_paths


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
