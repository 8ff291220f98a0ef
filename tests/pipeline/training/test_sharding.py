"""Two workers on Ray that divide the model between them: the losses of DDP, a checkpoint of both, and a model that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline import train
from strategies.checkpoints.manifest import read_manifests, verify
from tests.recipes import Recipe

pytestmark = pytest.mark.usefixtures("ray_session")

KEYS: dict[str, Any] = {"max_steps": 4, "eval_steps": 2, "tokens_per_forward": 260}
SILENT: dict[str, Any] = {"save_strategy": "no", "save_steps": None}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zero3": ({"adapter": "lora", "lora_r": 4}, {"deepspeed": "zero3"}),
    "fsdp2": ({}, {"fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_sharded_workers_give_the_run_of_ddp(recipe: Recipe, tmp_path: Path, name: str, tiny_base: str) -> None:
    form, sharding = CASES[name]
    expected = train(recipe(tmp_path / "ddp", **KEYS, **form, **SILENT))
    result = train(recipe(tmp_path / "run", **KEYS, **form, **sharding, save_steps=2))
    for column in ["loss", "grad_norm", "eval_loss", "rewards/margins"]:
        found, wanted = (run.history[column].dropna().tolist() for run in (result, expected))
        assert len(found) >= 2 and found == pytest.approx(wanted, rel=1e-4, abs=2e-5), column
    for step in (2, 4):
        folder = tmp_path / "run" / f"checkpoint-{step:06d}"
        files = [f"{kind}-{rank:05d}-of-00002" for kind in ("manifest", "state") for rank in (0, 1)]
        assert sorted(path.stem for path in folder.glob("*-of-*")) == files
        assert verify(folder) is None
        assert all(manifest["pieces"] for manifest in read_manifests(folder))
    if form:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(result.model_dir))
    else:
        AutoModelForCausalLM.from_pretrained(result.model_dir)
