"""Law 10: a trial among others on one base is the trial alone, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from strategies.slots import SlotHost
from tests.laws.slots import assert_same, attach, run_alone, run_together, run_trial, shared_base
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"), initializer_range=0.15)


TRIALS: dict[str, dict[str, Any]] = {
    "sigmoid": {"rl": "dpo", "seed": 1},
    "rslora": {"rl": "ipo", "peft_use_rslora": True, "lora_r": 8, "learning_rate": 5e-3},
    "dora": {"rl": "simpo", "peft_use_dora": True, "seed": 7, "lora_target_modules": ["q_proj", "down_proj"]},
}


def test_trials_with_others_and_alone(base: str, tmp_path: Path) -> None:
    trials = {name: {**keys, "base_model": base} for name, keys in TRIALS.items()}
    host = SlotHost(shared_base(base), run_trial(tmp_path), slots=3)
    first, second, third = attach(trials)
    ends = run_together(host, [[first, second], [], [third]])
    assert [end.error for end in ends.values()] == [None] * 3
    for name, keys in trials.items():
        assert_same(ends[name].result, run_alone(tmp_path / f"{name}-alone", keys))
