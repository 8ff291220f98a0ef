"""Law 3: one process, DDP, ZeRO-1, ZeRO-2, ZeRO-3 and FSDP2 give the same run and the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.processes import free_port, spawn
from tests.laws.runs import FAMILIES, LORA
from tests.laws.sharded import ENGINES, REPORTED, run, worker
from tests.tiny import adapter_folder, tiny_tokenizer

# Rows of 50 tokens: several forwards a step, of which the last step's has some without a row.
SMALL = {"tokens_per_forward": 50, "gradient_accumulation_steps": 2, "rows": 29, "eval_steps": 2}
VARIANTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "full": (list(ENGINES), {**SMALL, "cached": True, "streamed": True}),
    "lora": (list(ENGINES), {**SMALL, **LORA}),
    # Each of the others runs where it is hardest: the runs share two processes, and each takes seconds.
    "simpo": (["fsdp2"], {**SMALL, "rl": "simpo", "max_grad_norm": 0.1, "embedding_lr": 3e-3}),
    "ipo": (["zero3"], {**SMALL, "rl": "ipo", "cached": True, "sample_packing": False, "tokens_per_forward": None}),
    "orpo": (["fsdp2"], {**SMALL, "rl": "orpo", **LORA, "gradient_checkpointing": True}),
    "tied": (["zero3"], {**SMALL, "rl": "simpo", "base_model": "qwen", "max_grad_norm": 0.1}),
    "head": (["zero3", "fsdp2"], {**SMALL, **LORA, "lora_modules_to_save": ["lm_head"]}),
    "aot": (["zero2"], {**SMALL, "dpo_loss_type": ["aot"], "cached": True}),
    "live": (["zero2", "zero3", "fsdp2"], {**SMALL, "reference": "live"}),
    "kto": (["zero2"], {"rl": "kto", "gradient_accumulation_steps": 2, "eval_steps": 2, "eval_rows": 7}),
}
CASES = [(variant, engine) for variant, (engines, _) in VARIANTS.items() for engine in engines]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models by their family, and of an adapter."""
    folders = {}
    for family, make in FAMILIES.items():
        folders[family] = str(tmp_path_factory.mktemp(family))
        make(tiny_tokenizer(), initializer_range=0.1).save_pretrained(folders[family])
    return {**folders, "adapter": adapter_folder(tmp_path_factory.mktemp("adapter"))}


def keys_of(variant: str, bases: dict[str, str]) -> dict[str, Any]:
    keys = {"base_model": "llama", **VARIANTS[variant][1]}
    return {name: bases.get(value, value) if isinstance(value, str) else value for name, value in keys.items()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    runs = {f"{variant}-{engine}": (engine, keys_of(variant, bases)) for variant, engine in CASES}
    spawn(worker, 2, 2, free_port(), str(folder), runs)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, str]) -> dict[str, tuple[dict[str, Any], Path]]:
    found = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp("alone")
        found[variant] = (run(folder, "ddp", keys_of(variant, bases), micro_batch_size=4), folder / "model")
    return found


@pytest.mark.parametrize(("variant", "engine"), CASES)
def test_two_processes_give_the_run_of_one(two_processes: Path, alone: Any, variant: str, engine: str) -> None:
    found, (expected, _) = json.loads((two_processes / f"{variant}-{engine}.json").read_text()), alone[variant]
    assert len(found["loss"]) >= 2 and len(found["grad_norm"]) == len(found["loss"])
    for name in REPORTED:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-5), name


@pytest.mark.parametrize(("variant", "engine"), CASES)
def test_each_starts_at_its_reference(two_processes: Path, variant: str, engine: str, bases: dict[str, str]) -> None:
    """Law 11, wherever weights are divided."""
    if keys_of(variant, bases).get("rl", "dpo") in ("dpo", "ipo"):
        found = json.loads((two_processes / f"{variant}-{engine}.json").read_text())
        assert found["rewards/margins"][0] == pytest.approx(0, abs=2e-5)


@pytest.mark.parametrize(("variant", "engine"), CASES)
def test_the_model_is_written_whole(two_processes: Path, alone: Any, variant: str, engine: str, bases: dict[str, str]) -> None:
    base = keys_of(variant, bases)["base_model"]
    one, other = (load(folder, base) for folder in (two_processes / f"{variant}-{engine}" / "model", alone[variant][1]))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        # A fifth of a step: Adam divides a gradient near 0 by its own size, so that rounding moves such a weight.
        torch.testing.assert_close(weight, other[name], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_model_is_written_in_several_files(two_processes: Path, engine: str, bases: dict[str, str]) -> None:
    folder = two_processes / f"full-{engine}"
    assert len(list((folder / "streamed").glob("model-*-of-*.safetensors"))) > 2
    one, other = (load(folder / name, bases["llama"]) for name in ("streamed", "model"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load(folder: Path, base: str) -> dict[str, torch.Tensor]:
    if (folder / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).state_dict()
    assert (folder / "config.json").is_file() and not list(folder.glob("partial-*"))
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


TYPES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", **dict.fromkeys(("zero1", "zero2", "zero3"), "DEEPSPEED")}


@pytest.mark.parametrize("engine", list(ENGINES))
def test_each_rank_keeps_its_part(two_processes: Path, engine: str) -> None:
    whole, found = (json.loads((two_processes / f"full-{name}.json").read_text()) for name in ("ddp", engine))
    assert found["type"] == TYPES[engine]
    half = pytest.approx(0.5, rel=0.05)
    assert found["parameters"] / whole["parameters"] == (half if engine in ("zero3", "fsdp2") else 1)
    assert found["state"] / whole["state"] == (1 if engine == "ddp" else half)


def test_accelerate_still_ignores_fsdp_on_cpus(two_processes: Path) -> None:
    found = (two_processes / "unpatched").read_text()
    assert found == "MULTI_CPU", "accelerate shards on CPUs by itself: remove the patch in strategies.models.sharding"
