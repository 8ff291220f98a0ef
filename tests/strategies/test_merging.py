"""Merged models are base + adapter, whatever the adapter is and however the base is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.strategies.merging import IDS, change, logits, merge_folder, open_policy, unmerged, write_adapter
from tests.tiny import seeded, tiny_gpt2, tiny_model, tiny_qwen, tiny_tokenizer

FAMILIES: dict[str, Any] = {"llama": tiny_model, "qwen": tiny_qwen, "gpt2": tiny_gpt2}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "h.0.attn.c_attn": 2}, "alpha_pattern": {"v_proj": 64}},
    "layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "c_attn"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens", "wte"]},
    "tied": {"modules_to_save": ["embed_tokens", "wte"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 7]},
    "blocks": {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "c_attn"]},
    "parameters": {"target_modules": [], "target_parameters": ["up_proj.weight", "c_fc.weight"]},
    "bias": {"bias": "all"},
}
CASES = [
    *(("llama", kind) for kind in ("lora", "rslora", "dora", "pissa", "head")),
    *(("qwen", kind) for kind in KINDS),
    *(("gpt2", kind) for kind in ("lora", "dora", "patterns", "head", "tokens", "bias", "parameters")),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of several shards per family."""
    folders = {name: tmp_path_factory.mktemp(name) for name in FAMILIES}
    for name, folder in folders.items():
        FAMILIES[name](tiny_tokenizer()).save_pretrained(folder, max_shard_size="100KB")
    return folders


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_merging_equals_pefts_own_and_base_plus_adapter(family: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    policy = write_adapter(tmp_path / "adapter", FAMILIES[family](tiny_tokenizer()), **KINDS[kind])
    merged = merge_folder(bases[family], tmp_path / "adapter", tmp_path / "merged")
    expected = logits(unmerged(bases[family], tmp_path / "adapter"))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (logits(AutoModelForCausalLM.from_pretrained(bases[family])) - expected).abs().max() > 1e-3  # it does something
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    theirs = dict(policy.merge_and_unload().named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert 0 < merged.changed < merged.tensors and not merged.rounded.keys() - theirs.keys()


def test_tied_weights_stay_one_where_the_adapter_changes_them_alike(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind, is_untied in (("lora", False), ("tied", False), ("tokens", False), ("head", True), ("embedding", True)):
        write_adapter(tmp_path / kind, tiny_qwen(tiny_tokenizer()), **KINDS[kind])
        merged = merge_folder(bases["qwen"], tmp_path / kind, tmp_path / f"merged-{kind}")
        names = load_file(tmp_path / f"merged-{kind}" / "model.safetensors")
        assert (merged.is_untied, "lm_head.weight" in names) == (is_untied, is_untied), kind
        assert AutoConfig.from_pretrained(tmp_path / f"merged-{kind}").tie_word_embeddings is not is_untied


def test_lora_on_a_tied_embedding_unties_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's own merging adds it to the head too, of which unmerged it is no part."""
    policy = write_adapter(tmp_path / "adapter", tiny_qwen(tiny_tokenizer()), target_modules=["embed_tokens"])
    merged = merge_folder(bases["qwen"], tmp_path / "adapter", tmp_path / "merged")
    expected = logits(unmerged(bases["qwen"], tmp_path / "adapter"))
    assert merged.is_untied and merged.changed == 1
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )
    assert (logits(policy.merge_and_unload()) - expected).abs().max() > 1


def test_lora_with_biases_changes_the_biases(bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny_qwen(tiny_tokenizer()), target_modules=["q_proj"], lora_bias=True)
    merged = merge_folder(bases["qwen"], tmp_path / "adapter", tmp_path / "merged")
    assert {name.rpartition(".")[2] for name in merged.rounded} == {"weight", "bias"}
    expected = logits(unmerged(bases["qwen"], tmp_path / "adapter"))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "tokens", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_embeddings_that_grew_come_from_the_adapter(family: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    def grow(model: Any) -> None:
        model.resize_token_embeddings(288, mean_resizing=False)

    base = FAMILIES[family](tiny_tokenizer())
    grow(base)
    write_adapter(tmp_path / "adapter", base, save_embeddings=True, **KINDS[kind])
    assert set(range(259, 288)) <= set(open_policy(bases[family], tmp_path / "adapter").own_tokens)
    merge_folder(bases[family], tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 288 and merged.get_input_embeddings().num_embeddings == 288
    expected = unmerged(bases[family], tmp_path / "adapter", grow)
    ids = torch.cat([IDS, torch.tensor([[270, 287]])], dim=1)
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_sum_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    tiny_model(tiny_tokenizer()).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()).bfloat16().float(), use_dora=True)
    written = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    theirs = unmerged(tmp_path / "base", tmp_path / "adapter").merge_and_unload()
    for (name, mine), (_, other) in zip(merged.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other.bfloat16()), name
    assert len(written.rounded) == written.changed and written.config_dtype == torch.bfloat16
    wide = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32)
    assert wide.rounded.keys() == written.rounded.keys() and wide.nbytes == 2 * written.nbytes
    assert AutoConfig.from_pretrained(tmp_path / "wide").dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-6)
    narrow = open_policy(tmp_path / "base", tmp_path / "adapter").merge(torch.float16)
    assert len(narrow.rounded) == narrow.tensors  # bfloat16's range isn't float16's: all may have changed


def test_shards_are_as_large_as_they_may_be(bases: dict[str, Path], tmp_path: Path) -> None:
    assert len(list(bases["llama"].glob("*.safetensors"))) == 5
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()))
    merged = merge_folder(bases["llama"], tmp_path / "adapter", tmp_path / "merged", shard_size=70_000)
    shards = [load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")]
    sizes = [sum(tensor.nbytes for tensor in shard.values()) for shard in shards]
    assert all(size <= 70_000 or len(shard) == 1 for size, shard in zip(sizes, shards, strict=True))
    assert sum(sizes) == merged.nbytes and (len(shards), merged.tensors) == (7, 21)
    assert open_policy(bases["llama"], tmp_path / "adapter").nbytes(None) == merged.nbytes


def test_each_tensor_keeps_the_dtype_that_it_has_in_the_base(tmp_path: Path) -> None:
    """As routers and norms in float32 within a model in bfloat16, here with a head that has no name of its own."""
    base = tiny_qwen(tiny_tokenizer())
    base.config.dtype = torch.bfloat16
    base.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    for file in (tmp_path / "base").glob("*.safetensors"):
        tensors = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    change(tmp_path / "base" / "config.json", dtype="bfloat16")
    write_adapter(tmp_path / "adapter", tiny_qwen(tiny_tokenizer()), **KINDS["head"])
    merged = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    found = {name: tensor.dtype for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items()}
    assert {name for name, dtype in found.items() if dtype == torch.float32} == {name for name in found if "norm" in name}
    assert found["lm_head.weight"] == merged.dtype == merged.config_dtype == torch.bfloat16


def test_a_base_whose_files_name_its_tensors_otherwise(tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix that its model's names have, and hold buffers that it has no more."""
    base = tiny_gpt2(tiny_tokenizer())
    tensors = {name: tensor.clone() for name, tensor in base.transformer.state_dict().items()}
    tensors["h.0.attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base.config.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    expected = logits(unmerged(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )


def test_a_base_that_isnt_safetensors(tmp_path: Path) -> None:
    base = tiny_qwen(tiny_tokenizer())
    (tmp_path / "base").mkdir()
    torch.save(base.to(torch.bfloat16).state_dict(), tmp_path / "base" / "pytorch_model.bin")
    base.config.dtype = torch.bfloat16
    base.config.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base.float())
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    theirs = unmerged(tmp_path / "base", tmp_path / "adapter").merge_and_unload()
    for (name, mine), (_, other) in zip(merged.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other.bfloat16()), name


EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def test_experts_that_the_files_hold_one_by_one(tmp_path: Path) -> None:
    """They become one tensor on loading, are changed as that, and are taken apart again."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=259, pad_token_id=None)
    seeded(MixtralForCausalLM, config).save_pretrained(tmp_path / "base")
    for kind, keys in (("attention", {"target_modules": ["q_proj"]}), ("experts", {}), ("parameters", EXPERTS)):
        write_adapter(tmp_path / kind, seeded(MixtralForCausalLM, config), **keys)
        found = merge_folder(tmp_path / "base", tmp_path / kind, tmp_path / f"merged-{kind}")
        assert found.rounded.keys() <= {name for name, _ in seeded(MixtralForCausalLM, config).named_parameters()}
        tensors = load_file(tmp_path / f"merged-{kind}" / "model.safetensors")
        assert sum(".experts." in name for name in tensors) == 12
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{kind}")
        expected = logits(unmerged(tmp_path / "base", tmp_path / kind))
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
