"""What can't be merged is said in a message that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from safetensors.torch import load_file, save_file

from strategies.config import as_config
from strategies.merging.base import load_base
from strategies.merging.policy import read_adapter_config
from tests.strategies.merging import change, merge_folder, open_policy, write_adapter
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(tiny_tokenizer()).save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, tiny_model(tiny_tokenizer()))
    return folder


@pytest.fixture
def adapter(written: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(written, tmp_path / "adapter"))


def edit(folder: Path, drop: str = "", **tensors: torch.Tensor) -> None:
    """Take tensors out of an adapter's file, and put others in."""
    file = folder / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not drop or drop not in name}
    save_file({**kept, **tensors}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"layer_replication": [[0, 2], [1, 2]]}, "LoRA with layer_replication"),
        ({"alora_invocation_tokens": [1]}, "LoRA with alora_invocation_tokens"),
        ({"init_lora_weights": "corda"}, "LoRA with init_lora_weights: corda"),
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA with init_lora_weights: pissa_niter_4"),
    ],
)
def test_kinds_of_lora_that_have_no_sum(adapter: Path, values: dict[str, Any], kind: str) -> None:
    change(adapter / "adapter_config.json", **values)
    with pytest.raises(ValueError, match=f"holds {kind}, which can't be merged here; LoRA can, with rsLoRA, DoRA"):
        read_adapter_config(adapter)


def test_an_adapter_that_isnt_lora(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(tiny_tokenizer()), config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="holds an adapter of the kind IA3, which can't be merged here"):
        read_adapter_config(tmp_path)


def test_an_adapters_folder_without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds an adapter's config and no weights \(adapter_model.safetensors or"):
        read_adapter_config(adapter)


def test_a_config_that_is_no_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json' can't be read"):
        read_adapter_config(adapter)


@pytest.mark.parametrize("drop", ["layers.1.self_attn.q_proj.lora_B", "layers.0.mlp.up_proj"])
def test_weights_that_the_adapter_lacks(base: Path, adapter: Path, drop: str) -> None:
    edit(adapter, drop)
    with pytest.raises(ValueError, match=rf"lacks weights, such as model\.{drop}"):
        open_policy(base, adapter)


def test_modules_that_the_adapter_lacks(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()), modules_to_save=["lm_head"])
    edit(tmp_path / "adapter", "lm_head")
    with pytest.raises(ValueError, match="lacks weights, such as base_model.model.lm_head.weight"):
        open_policy(base, tmp_path / "adapter")


def test_another_base_of_another_width_or_depth(adapter: Path, tmp_path: Path) -> None:
    tiny_model(tiny_tokenizer(), hidden_size=32).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="was trained on another model than its base model is now: size mismatch for"):
        open_policy(tmp_path / "narrow", adapter)
    tiny_model(tiny_tokenizer(), num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    with pytest.raises(ValueError, match="14 weights that its base model has no place for, such as .*layers.1"):
        open_policy(tmp_path / "shallow", adapter)


def test_another_base_with_other_modules(base: Path, adapter: Path) -> None:
    change(adapter / "adapter_config.json", target_modules=["c_attn"])
    with pytest.raises(ValueError, match="doesn't fit the base model: Target modules .*c_attn.* not found"):
        open_policy(base, adapter)


def test_a_bias_that_has_nothing_to_be_added_to(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()), lora_bias=True)
    with pytest.raises(ValueError, match=r"adapter' can't be merged: Impossible to merge LoRA with `lora_bias=True`"):
        open_policy(base, tmp_path / "adapter").merge()


def test_new_tokens_without_an_embedding_in_the_head(base: Path, tmp_path: Path) -> None:
    model = tiny_model(tiny_tokenizer())
    model.resize_token_embeddings(270, mean_resizing=False)
    write_adapter(tmp_path / "adapter", model, save_embeddings=True)
    edit(tmp_path / "adapter", "lm_head")
    with pytest.raises(ValueError, match="embeddings for 270 tokens, and none for lm_head.weight, .* has for 259"):
        open_policy(base, tmp_path / "adapter")


@pytest.mark.parametrize(("number", "where"), [(float("inf"), "float32"), (1e8, "float16")])
def test_sums_that_are_no_numbers(base: Path, adapter: Path, tmp_path: Path, number: float, where: str) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit(adapter, **{name: torch.full((64, 4), number)})
    message = (
        "adapter' can't be merged: NaNs detected in the merged weights"
        if where == "float32"
        else "values that float16 can't hold"
    )
    with pytest.raises(ValueError, match=message):
        merge_folder(base, adapter, tmp_path / "merged", dtype=getattr(torch, where))


def test_a_base_that_lacks_a_shard_or_a_tensor(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (folder / first).rename(tmp_path / first)
    with pytest.raises(ValueError, match=f"no model could be loaded from .*{first}"):
        open_policy(folder, adapter)
    tensors = load_file(tmp_path / first)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / first, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of the model's weights, such as model\.embed_tokens\.weight; give a complete model"
    ):
        open_policy(folder, adapter)
    (folder / first).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no model could be loaded from .*header"):
        open_policy(folder, adapter)


def test_a_base_whose_tensors_arent_what_its_config_wants(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    change(folder / "config.json", vocab_size=300)
    with pytest.raises(ValueError, match="its weights have other shapes than its config wants"):
        open_policy(folder, adapter)


def test_a_base_that_is_stored_quantized(base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    cfg = as_config({"base_model": str(folder), "rl": "dpo"})
    with pytest.raises(ValueError, match=r"is stored quantized \(gptq\), .* give the model that it was made from with --base"):
        load_base(cfg)
    shutil.copy(base / "config.json", folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has the dtype F8_E4M3, of quantized weights"):
        load_base(cfg)
