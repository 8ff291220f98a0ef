"""Law 3 for rows with pictures: one process, DDP, ZeRO-3 and FSDP2 give the same run, although workers have other pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import free_port, spawn
from tests.laws.runs import LORA
from tests.laws.sharded import REPORTED
from tests.laws.vision import engine_run, worker
from tests.tiny_vision import FAMILIES, save_vision

# Several forwards a step, of which some have no picture, and in the last step some no row.
SMALL: dict[str, Any] = {"tokens_per_forward": 450, "gradient_accumulation_steps": 2, "eval_steps": 2}
VARIANTS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "packed": ("llava", ["ddp", "zero3", "fsdp2"], SMALL),
    "padded": ("idefics3", ["ddp", "zero3"], {**SMALL, "tokens_per_forward": None, "sample_packing": False}),
    "grids": ("qwen2_5_vl", ["ddp", "fsdp2"], {**SMALL, "tokens_per_forward": None}),
    "lora": ("llava", ["zero3"], {**SMALL, **LORA}),
    "checkpointing": ("llava", ["ddp"], {**SMALL, "gradient_checkpointing": True}),
    "kto": ("llava", ["ddp"], {"rl": "kto", "rows": 16, "gradient_accumulation_steps": 2, "eval_steps": 2}),
}
CASES = [(variant, engine) for variant, (_, engines, _) in VARIANTS.items() for engine in engines]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    families = {family for family, _, _ in VARIANTS.values()}
    return {family: save_vision(tmp_path_factory.mktemp(family), family) for family in sorted(families)}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    runs = {}
    for variant, engine in CASES:
        family, _, keys = VARIANTS[variant]
        runs[f"{variant}-{engine}"] = (family, bases[family], engine, keys)
    spawn(worker, 2, 2, free_port(), str(folder), runs)
    return folder


@pytest.mark.parametrize(("variant", "engine"), CASES)
def test_two_processes_give_the_run_of_one(
    two_processes: Path, bases: dict[str, str], variant: str, engine: str, tmp_path: Path
) -> None:
    family, _, keys = VARIANTS[variant]
    alone = engine_run(tmp_path, FAMILIES[family](), bases[family], "ddp", {**keys, "micro_batch_size": 4})
    found = json.loads((two_processes / f"{variant}-{engine}.json").read_text())
    assert len(found["loss"]) >= 2 and len(found["grad_norm"]) == len(found["loss"])
    for name in REPORTED:
        assert found[name] == pytest.approx(alone[name], rel=1e-4, abs=2e-5), name
