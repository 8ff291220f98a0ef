"""Law 3, for DDP: one process and two give the same losses.

The global batch stays the same: two processes take half the pairs each. Numbers of labelled rows divide by the global batch,
since accelerate fills an incomplete last batch by repeating rows; a plan of pairs has batches that don't divide as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import free_port, spawn
from strategies.config import as_config
from strategies.config.schedule import total_steps
from tests.laws.runs import CONFIG, LORA, losses, prepared, trained, worker
from tests.tiny import adapter_folder

ONCE = {"gradient_accumulation_steps": 1}
TWICE = {"gradient_accumulation_steps": 2}
SAME: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {**LORA, "eval_steps": 4, "dpo_generate_during_eval": True},
    "continued": {"adapter": "lora", "lora_model_dir": "adapter"},
    "simpo": {"rl": "simpo", "cpo_alpha": 0.1},
    "orpo": {"rl": "orpo", **LORA},
    "kto": {"rl": "kto", "eval_steps": 4, "num_epochs": 2.0},
    # 5 rows: the second worker has none in the last forward; 7: it has one.
    "evaluated": {"eval_steps": 4, "eval_rows": 5},
    "kto_evaluated": {"rl": "kto", "eval_steps": 4, "eval_rows": 7},
    # The last global batch has one row: the second worker runs it, too, but doesn't count it.
    "small_forwards": {"tokens_per_forward": 50, "rows": 13, "eval_steps": 2, "eval_rows": 5, "micro_batch_size": 1, **TWICE},
    "padded": {"sample_packing": False, "rows": 13, "eval_steps": 2, "eval_rows": 5},
    "aot": {"dpo_loss_type": ["aot"], "tokens_per_forward": 50, "rows": 13, "eval_steps": 4, "eval_rows": 5},
    "sft": {"dpo_loss_type": ["sigmoid", "sft"], "tokens_per_forward": 100, "rows": 15},
    "synced": {"trl": {"sync_ref_model": True, "ref_model_sync_steps": 2}},
}
UNEVEN: dict[str, dict[str, Any]] = {
    "uneven": {"gradient_accumulation_steps": 2, "rows": 13, "num_epochs": 1.5},
    "uneven_drop": {"gradient_accumulation_steps": 2, "rows": 13, "dataloader_drop_last": True},
}
RUNS = {**SAME, **UNEVEN}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return adapter_folder(tmp_path_factory.mktemp("adapter"))


def keys_of(name: str, adapter: str) -> dict[str, Any]:
    return {**RUNS[name], **({"lora_model_dir": adapter} if "lora_model_dir" in RUNS[name] else {})}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, adapter: str) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    runs = {name: {"micro_batch_size": 2, **keys_of(name, adapter)} for name in RUNS}
    spawn(worker, 2, 2, free_port(), str(folder), runs)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS}


@pytest.mark.parametrize("name", list(SAME))
def test_two_processes_give_the_losses_of_one(two_processes: dict[str, Any], name: str, adapter: str, tmp_path: Path) -> None:
    keys = keys_of(name, adapter)
    alone = trained(tmp_path, rows=prepared(keys.pop("rows", 16), keys), **{**keys, "micro_batch_size": 4, **ONCE})
    found = two_processes[name]
    assert len(losses(alone)) == 4 * int(RUNS[name].get("num_epochs", 1))
    assert found["loss"] == pytest.approx(losses(alone), rel=1e-4)
    for metric in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[metric] == pytest.approx(losses(alone, metric), rel=1e-4)
    assert found["num_tokens"] == losses(alone, "num_tokens")
    # Before the first step the margins are 0 up to rounding.
    assert found["rewards/margins"][1:] == pytest.approx(losses(alone, "rewards/margins")[1:], rel=1e-3)


@pytest.mark.parametrize("name", [name for name in RUNS if RUNS[name].get("rl") != "kto"])
def test_gradients_are_exchanged_once_per_step(two_processes: dict[str, Any], name: str) -> None:
    """However many forwards a step has."""
    assert two_processes[name]["exchanges"] == two_processes[name]["steps"]


@pytest.mark.parametrize("name", list(RUNS))
def test_two_processes_run_the_steps_that_were_told(two_processes: dict[str, Any], name: str) -> None:
    keys = {key: value for key, value in RUNS[name].items() if key not in ("rows", "eval_rows")}
    config = as_config({**CONFIG, "micro_batch_size": 2, **keys})
    assert two_processes[name]["steps"] == total_steps(RUNS[name].get("rows", 16), config, world_size=2)
