"""Models written parameter by parameter, in as many files as it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from strategies.models import gather_weights as gathering
from strategies.models.gather_weights import write_whole
from tests.tiny import tiny_model, tiny_qwen, tiny_tokenizer


@pytest.mark.parametrize("make", [tiny_model, tiny_qwen])
@pytest.mark.parametrize("file_bytes", [60_000, 2**32])
def test_a_model_in_any_number_of_files_is_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: type[torch.nn.Module], file_bytes: int
) -> None:
    monkeypatch.setattr(gathering, "FILE_BYTES", file_bytes)
    model = make(tiny_tokenizer())
    write_whole(model, tmp_path, writes=True)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if file_bytes == 2**32:
        assert files == ["model.safetensors"] and not (tmp_path / "model.safetensors.index.json").exists()
    else:
        listing = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(files) > 2 and set(listing["weight_map"].values()) == set(files)
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert listing["metadata"]["total_size"] == sum(one.numel() * one.element_size() for one in model.parameters())
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name], weight), name


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    write_whole(tiny_model(tiny_tokenizer()), tmp_path, writes=False)
    assert list(tmp_path.iterdir()) == []
