"""`train`: one process, from a folder to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strategies import TrainDatasetMeta, train
from tests.tiny import pairs, prepared_pairs


@pytest.mark.parametrize("rows", [pairs(8), prepared_pairs(8)], ids=["raw", "prepared"])
def test_the_usage_example(config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """As architecture.md writes it."""
    dataset_meta = TrainDatasetMeta(train_dataset=rows, eval_dataset=rows[:2])
    model, tokenizer, trainer = train(cfg=config, dataset_meta=dataset_meta)
    assert trainer.state.global_step == 4
    assert tokenizer.eos_token == "<|im_end|>"
    folder = Path(config["output_dir"]) / "model"
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == model.config.hidden_size == 64


def test_training_twice_gives_the_same(config: dict[str, Any]) -> None:
    runs = [
        train(cfg={**config, "adapter": "lora"}, dataset_meta=TrainDatasetMeta(pairs(8), total_num_steps=3)) for _ in range(2)
    ]
    first, second = ([entry.get("loss") for entry in trainer.state.log_history] for _, _, trainer in runs)
    assert first == second


def test_added_tokens_are_saved_with_an_adapter(config: dict[str, Any]) -> None:
    from safetensors import safe_open

    train(cfg={**config, "adapter": "lora", "tokens": ["<new>"], "max_steps": 1}, dataset_meta=TrainDatasetMeta(pairs(4)))
    with safe_open(Path(config["output_dir"]) / "model" / "adapter_model.safetensors", "pt") as weights:
        assert any("embed_tokens" in name for name in weights.keys())  # noqa: SIM118


def test_tensorboard_writes_into_the_run(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    train(cfg={**config, "use_tensorboard": True, "max_steps": 1}, dataset_meta=TrainDatasetMeta(pairs(4)))
    assert list(Path(config["output_dir"], "tensorboard").iterdir())


def test_without_ray_a_run_goes_to_a_path(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="output_dir: must be a path without Ray, got 's3://bucket/run'"):
        train(cfg={**config, "output_dir": "s3://bucket/run"}, dataset_meta=TrainDatasetMeta(pairs(4)))
