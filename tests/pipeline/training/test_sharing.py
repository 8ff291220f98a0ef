"""How many runs fit the memory beside one copy of the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.config import RunConfig, parse_config
from pipeline.doctor.machine import Machine
from pipeline.doctor.memory import USABLE
from pipeline.training import sharing
from pipeline.training.sharing import SLOT_BYTES, fitting_slots
from strategies import memory
from strategies.memory import MemoryEstimate
from strategies.slots.limits import JOINT_TOKENS
from tests.tiny import save_tiny

LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture
def trial(base: str) -> Callable[..., RunConfig]:
    def make(**keys: Any) -> RunConfig:
        values = {"base_model": base, "datasets": [{"path": "d.jsonl"}], "sequence_len": 64, "bf16": False, **LORA}
        return parse_config({**values, **keys})

    return make


def machine_of(usable: float) -> Machine:
    size = int(usable / USABLE["CPU"]) + 1
    return Machine("CPU", size, size)


def each_of(found: MemoryEstimate, is_joint: bool = True) -> int:
    return found.gradients * (3 if is_joint else 2) + found.optimizer + SLOT_BYTES


def test_slots_are_those_of_the_most_demanding_run(trial: Callable[..., RunConfig]) -> None:
    small, large = trial(), trial(lora_r=256)
    machine = machine_of(2 * 2**30)
    fewest = fitting_slots([large], 1, machine)
    assert 1 < fewest < fitting_slots([small], 1, machine)
    assert fitting_slots([small, large], 1, machine) == fitting_slots([large, small], 1, machine) == fewest
    longer, live = trial(sequence_len=4096), trial(lora_r=64, reference="live")
    assert fitting_slots([small, longer, live], 1, machine) == min(fitting_slots([one], 1, machine) for one in (longer, live))


def test_recipes_that_differ_in_fractions_are_estimated_once(
    trial: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimated = []
    monkeypatch.setattr(sharing, "_fitting", lambda recipe, room, gpu: estimated.append(recipe) or 3)
    recipes = [trial(learning_rate=1e-4 * number, seed=number) for number in range(1, 9)]
    assert fitting_slots([*recipes, trial(lora_dropout=0.1), trial(lora_dropout=0.2)], 1, machine_of(2**30)) == 3
    assert len(estimated) == 2


def test_rows_of_a_joint_forward_take_room(trial: Callable[..., RunConfig]) -> None:
    recipe = trial()
    alone, joint = memory.estimate(recipe), memory.estimate(recipe, joint_tokens=JOINT_TOKENS["cpu"])
    row = alone.forward.tokens
    assert joint.forward.tokens == JOINT_TOKENS["cpu"] > 3 * row and joint.total > alone.total
    most = JOINT_TOKENS["cpu"] // row
    # A forward that is full takes no more with further runs.
    many = machine_of(joint.total + 2 * most * each_of(alone))
    assert fitting_slots([recipe], 1, many) == 2 * most + 1
    # One that isn't has what each run's row brings.
    of_row = row * (joint.total - alone.total) / (JOINT_TOKENS["cpu"] - row)
    room = alone.total + 2 * (each_of(alone) + of_row)
    assert [fitting_slots([recipe], 1, machine_of(size)) for size in (room - 2**20, room + 2**20)] == [2, 3]
    # Nothing more where runs take turns.
    turns = trial(full_determinism=True)
    assert fitting_slots([turns], 1, machine_of(alone.total + 2 * each_of(alone, is_joint=False) + 2**20)) == 3
    assert fitting_slots([turns], 1, machine_of(alone.total - 2**20)) == 0


@pytest.mark.parametrize("keys", [{"sample_packing": False}, {"gradient_checkpointing": True}])
def test_runs_that_take_turns_have_no_joint_forward(trial: Callable[..., RunConfig], keys: dict[str, Any]) -> None:
    recipe = trial(**keys)
    alone = memory.estimate(recipe)
    assert fitting_slots([recipe], 1, machine_of(alone.total + 2 * each_of(alone, is_joint=False) + 2**20)) == 3
