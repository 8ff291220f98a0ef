"""Law 10 with a base whose layers are divided among the workers: a trial is what it is on a whole base, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.processes import free_port, spawn
from tests.laws.slots import TOLERANCES, assert_same, divided_worker
from tests.tiny import save_tiny

TRIALS: dict[str, dict[str, Any]] = {
    "lora": {"rl": "dpo", "seed": 1},
    "dora": {"rl": "simpo", "peft_use_dora": True, "seed": 7, "lora_target_modules": ["q_proj", "down_proj"]},
    # Padded batches and TRL's head; a layer's forward runs again in the backward.
    "kto": {"rl": "kto", "micro_batch_size": 2, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("divided")
    base = save_tiny(folder / "base", initializer_range=0.15, num_hidden_layers=4)
    spawn(
        divided_worker,
        2,
        2,
        free_port(),
        str(folder),
        base,
        {name: {**keys, "base_model": base} for name, keys in TRIALS.items()},
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", list(TRIALS))
def test_a_trial_is_what_it_is_on_a_whole_base(name: str, two_processes: list[dict[str, Any]]) -> None:
    """While others join, fail and are stopped."""
    one, other = two_processes
    for found in (one, other):
        assert found["ends"].get(name) == "None"
        assert_same(found[name], found[f"{name} whole"], TOLERANCES["joint"])
    assert_same(one[name], other[name])


@pytest.mark.parametrize("name", list(TRIALS))
def test_a_trial_is_what_it_is_alone_under_fsdp2(name: str, two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        assert_same(found[name], found[f"{name} fsdp2"], rtol=1e-4)


def test_others_left(two_processes: list[dict[str, Any]]) -> None:
    for found in two_processes:
        assert "planted" in found["ends"]["fails"]
        assert len(found["stopped"]["history"]) < len(found["lora"]["history"])


def test_each_worker_holds_its_part(two_processes: list[dict[str, Any]]) -> None:
    """And one whole layer of four; what isn't in layers is whole."""
    for found in two_processes:
        layers, rest, one = found["layers"], found["rest"], found["layers"] // 4
        assert found["between layers"] == rest + layers // 2
        assert found["whole between turns"] == rest + one and found["whole at the end"] == rest
