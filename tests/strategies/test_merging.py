"""Merged models are base + adapter, whatever the adapter is and however the base is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.strategies.merging import IDS, logits, merge_folder, open_plan, unmerged, write_adapter
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
    plan = merge_folder(bases[family], tmp_path / "adapter", tmp_path / "merged")
    expected = logits(unmerged(bases[family], tmp_path / "adapter"))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (logits(AutoModelForCausalLM.from_pretrained(bases[family])) - expected).abs().max() > 1e-3  # it does something
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    theirs = dict(policy.merge_and_unload().named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert 0 < len(plan.merged) < len(plan.outputs)


def test_tied_weights_stay_one_where_the_adapter_changes_them_alike(bases: dict[str, Path], tmp_path: Path) -> None:
    for kind, is_untied in (("lora", False), ("tied", False), ("tokens", False), ("head", True), ("embedding", True)):
        write_adapter(tmp_path / kind, tiny_qwen(tiny_tokenizer()), **KINDS[kind])
        plan, _ = open_plan(bases["qwen"], tmp_path / kind)
        names = {output.name for output in plan.outputs}
        assert (plan.is_untied, "lm_head.weight" in names) == (is_untied, is_untied), kind


def test_lora_on_a_tied_embedding_unties_it(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's own merging adds it to the head too, of which unmerged it is no part."""
    policy = write_adapter(tmp_path / "adapter", tiny_qwen(tiny_tokenizer()), target_modules=["embed_tokens"])
    plan = merge_folder(bases["qwen"], tmp_path / "adapter", tmp_path / "merged")
    expected = logits(unmerged(bases["qwen"], tmp_path / "adapter"))
    assert plan.is_untied
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )
    assert (logits(policy.merge_and_unload()) - expected).abs().max() > 1


def test_lora_with_biases_changes_the_biases(bases: dict[str, Path], tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tiny_qwen(tiny_tokenizer()), target_modules=["q_proj"], lora_bias=True)
    plan = merge_folder(bases["qwen"], tmp_path / "adapter", tmp_path / "merged")
    assert {output.name.rpartition(".")[2] for output in plan.merged} == {"weight", "bias"}
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
    _, policy = open_plan(bases[family], tmp_path / "adapter")
    assert policy.grown_to == 288 and set(range(259, 288)) <= set(policy.own_tokens())
    merge_folder(bases[family], tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 288 and merged.get_input_embeddings().num_embeddings == 288
    expected = unmerged(bases[family], tmp_path / "adapter", grow)
    ids = torch.cat([IDS, torch.tensor([[270, 287]])], dim=1)
    torch.testing.assert_close(merged(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_sum_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    tiny_model(tiny_tokenizer()).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()).bfloat16().float(), use_dora=True)
    plan = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    theirs = unmerged(tmp_path / "base", tmp_path / "adapter").merge_and_unload()
    for (name, mine), (_, other) in zip(merged.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other.bfloat16()), name
    assert set(plan.rounded) == {output.parameter for output in plan.merged}
    wide = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "wide", dtype=torch.float32)
    assert set(wide.rounded) == set(plan.rounded) and wide.nbytes == 2 * plan.nbytes
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-6)
    narrow, _ = open_plan(tmp_path / "base", tmp_path / "adapter", torch.float16)
    assert len(narrow.rounded) == len(narrow.outputs)  # bfloat16's range isn't float16's: all may have changed


def test_shards_are_as_large_as_they_may_be(bases: dict[str, Path], tmp_path: Path) -> None:
    assert len(list(bases["llama"].glob("*.safetensors"))) == 5
    write_adapter(tmp_path / "adapter", tiny_model(tiny_tokenizer()))
    done: list[tuple[int, int]] = []
    from strategies.merging.writing import write_shards

    plan, _ = open_plan(bases["llama"], tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    files = write_shards(plan, tmp_path / "merged", 70_000, lambda number, of: done.append((number, of)))
    sizes = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            tensors = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118 - no mapping
        sizes[file.name] = sum(tensor.nbytes for tensor in tensors)
        assert sizes[file.name] <= 70_000 or len(tensors) == 1
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values()) == plan.nbytes
    assert set(index["weight_map"]) == {output.name for output in plan.outputs}
    assert len(files) == 7 and done == [(number, 21) for number in range(1, 22)]


def test_names_are_those_of_the_bases_files(tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix that its model's names have, and hold buffers that it has no more."""
    from safetensors.torch import save_file

    base = tiny_gpt2(tiny_tokenizer())
    tensors = {name: tensor.clone() for name, tensor in base.transformer.state_dict().items()}
    tensors["h.0.attn.bias"] = torch.ones(4, 4, dtype=torch.bool)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base.config.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base)
    plan = merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert {output.name for output in plan.outputs} == set(tensors)
    expected = logits(unmerged(tmp_path / "base", tmp_path / "adapter"))
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected, rtol=1e-4, atol=1e-5
    )


def test_a_base_that_isnt_safetensors_is_loaded_whole(tmp_path: Path) -> None:
    from strategies.config import as_config
    from strategies.merging.weights import open_weights

    base = tiny_qwen(tiny_tokenizer())
    (tmp_path / "base").mkdir()
    torch.save(base.to(torch.bfloat16).state_dict(), tmp_path / "base" / "pytorch_model.bin")
    base.config.dtype = torch.bfloat16
    base.config.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base.float())
    assert open_weights(as_config({"base_model": str(tmp_path / "base"), "rl": "dpo"})).whole
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    theirs = unmerged(tmp_path / "base", tmp_path / "adapter").merge_and_unload()
    for (name, mine), (_, other) in zip(merged.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(mine, other.bfloat16()), name


def test_experts_that_the_files_hold_one_by_one(tmp_path: Path) -> None:
    """They become one tensor on loading, are changed as that, and are taken apart again."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, vocab_size=259, pad_token_id=None)
    seeded(MixtralForCausalLM, config).save_pretrained(tmp_path / "base")
    for kind, keys in (("attention", {"target_modules": ["q_proj"]}), ("experts", {})):
        write_adapter(tmp_path / kind, seeded(MixtralForCausalLM, config), **keys)
        plan = merge_folder(tmp_path / "base", tmp_path / kind, tmp_path / f"merged-{kind}", shard_size=20_000)
        parts = [output for output in plan.outputs if ".experts." in output.name]
        assert len(parts) == 12 and {output.is_merged for output in parts} == {kind == "experts"}
        assert set(plan.rounded) <= {name for name, _ in seeded(MixtralForCausalLM, config).named_parameters()}
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{kind}")
        expected = logits(unmerged(tmp_path / "base", tmp_path / kind))
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
