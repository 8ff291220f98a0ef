"""A merged model passes when rounding explains how it differs from base and adapter, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from strategies.config import as_config
from strategies.merging.base import memory_needed
from strategies.merging.verification import Differences, compare, expected_logits
from tests.strategies.merging import IDS, change, merge_folder, open_policy, write_adapter
from tests.tiny import tiny_model, tiny_tokenizer

SEQUENCES = [IDS[0].tolist(), IDS[0].flip(0)[:40].tolist()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(tiny_tokenizer()).save_pretrained(folder)
    return folder


def differences(base: Path, adapter: Path, out: Path, dtype: str, merged_adapter: Path | None = None) -> Differences:
    """Merge an adapter, and compare with another one, if it is given."""
    written = merge_folder(base, merged_adapter or adapter, out, dtype=getattr(torch, dtype))
    steps: list[int] = []
    expected = expected_logits(open_policy(base, adapter).model, SEQUENCES, lambda: steps.append(1))
    found = compare(expected, out, written.rounded, lambda: steps.append(1))
    assert (found.sequences, found.tokens, len(steps)) == (2, 140, 8)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("keys", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"])
def test_correct_merges_are_explained_and_a_wrong_scale_is_not(base: Path, tmp_path: Path, dtype: str, keys: Any) -> None:
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()), **keys)
    right = differences(base, tmp_path / "adapter", tmp_path / "right", dtype)
    assert right.is_explained and not right.hides_adapter
    assert 0.3 < right.logps.rms / right.rounding.rms < 2  # draws of one kind
    assert right.same_argmax > 0.9 and right.logps.largest >= right.logps.rms > 0
    write_adapter(tmp_path / "other", tiny_model(tiny_tokenizer()), **keys)
    change(tmp_path / "other" / "adapter_config.json", lora_alpha=16)  # twice the scale
    wrong = differences(base, tmp_path / "adapter", tmp_path / "wrong", dtype, tmp_path / "other")
    assert not wrong.is_explained and wrong.adapter == right.adapter


def test_one_matrix_with_a_wrong_scale(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()))
    write_adapter(tmp_path / "other", tiny_model(tiny_tokenizer()))
    change(tmp_path / "other" / "adapter_config.json", alpha_pattern={"layers.1.mlp.down_proj": 16})
    for dtype in ("float32", "bfloat16"):
        assert not differences(base, tmp_path / "adapter", tmp_path / dtype, dtype, tmp_path / "other").is_explained, dtype


def test_an_adapter_smaller_than_rounding_is_told(base: Path, tmp_path: Path) -> None:
    model = write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = differences(base, tmp_path / "adapter", tmp_path / "merged", "bfloat16")
    assert found.is_explained and found.hides_adapter
    assert not differences(base, tmp_path / "adapter", tmp_path / "wide", "float32").hides_adapter


def test_numbers_that_are_none_are_a_difference(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()))
    written = merge_folder(base, tmp_path / "adapter", tmp_path / "merged")
    expected = expected_logits(open_policy(base, tmp_path / "adapter").model, SEQUENCES, lambda: None)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    tensors["lm_head.weight"][5] = float("nan")
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    assert not compare(expected, tmp_path / "merged", written.rounded, lambda: None).is_explained
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the merged model lacks 1 weights, such as lm_head.weight"):
        compare(expected, tmp_path / "merged", written.rounded, lambda: None)


def test_the_memory_of_a_merge_is_one_model_and_logits(base: Path) -> None:
    cfg = as_config({"base_model": str(base), "rl": "dpo"})
    parameters = sum(parameter.numel() for parameter in tiny_model(tiny_tokenizer()).parameters())
    assert memory_needed(cfg, 100) == 4 * (parameters + 100 * 259)
