"""Two workers on Ray that divide the model between them: the losses of DDP, and a model that loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pipeline import TrainResult, train
from tests.pipeline.training.conftest import Recipe

pytestmark = pytest.mark.usefixtures("ray_session")

KEYS: dict[str, Any] = {"save_strategy": "no", "save_steps": None, "max_steps": 4, "eval_steps": 2, "tokens_per_forward": 260}
LORA = {"adapter": "lora", "lora_r": 4}
COLUMNS = ["loss", "grad_norm", "eval_loss", "rewards/margins"]


@pytest.fixture(scope="module")
def under_ddp(ray_session: Any, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainResult]:
    folder = tmp_path_factory.mktemp("ddp")
    forms: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}
    return {name: train(recipe(folder / name, **KEYS, **form)) for name, form in forms.items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero2": ("full", {"deepspeed": "zero2"}),
    "zero3": ("lora", {"deepspeed": "zero3", **LORA}),
    "fsdp2": ("full", {"fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_sharded_workers_give_the_run_of_ddp(
    under_ddp: dict[str, TrainResult], recipe: Recipe, tmp_path: Path, name: str, tiny_base: str
) -> None:
    form, keys = CASES[name]
    result, expected = train(recipe(tmp_path / "run", **KEYS, **keys)), under_ddp[form]
    for column in COLUMNS:
        found, wanted = (run.history[column].dropna().tolist() for run in (result, expected))
        assert len(found) >= 2 and found == pytest.approx(wanted, rel=1e-4, abs=2e-5), column
    if form == "full":
        AutoModelForCausalLM.from_pretrained(result.model_dir)
    else:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(result.model_dir))
