"""The DPO strategy: what it reads, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from strategies.config import as_config
from strategies.dpo import LOSS_TYPES, DPOStrategy

BASE: dict[str, Any] = {"base_model": "tiny", "rl": "dpo"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"dpo_loss_type": ["sigmoid", "sigmoud"]},
            r"dpo_loss_type\.1: unknown loss 'sigmoud'; available: sigmoid, hinge",
        ),
        (
            {"dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0]},
            r"dpo_loss_weights: got 1 weights for 2 losses \(sigmoid, sft\)",
        ),
        (
            {"dpo_loss_type": ["hinge", "ipo"], "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing: has no effect with dpo_loss_type: hinge, ipo; it is read by sigmoid, robust",
        ),
        (
            {"dpo_loss_type": ["sigmoid", "sft"], "dpo_label_smoothing": 0.1},
            "dpo_label_smoothing: with sigmoid it works only when sigmoid is the one loss",
        ),
        ({"dpo_loss_type": ["exo_pair"]}, "dpo_label_smoothing: dpo_loss_type: exo_pair needs it above 0"),
        (
            {"dpo_loss_type": ["aot_unpaired"], "dpo_use_weighting": True},
            "dpo_use_weighting: can't weight the pairs of aot_unpaired",
        ),
    ],
)
def test_contradictions_are_errors_with_the_key(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_config({**BASE, **keys})


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_every_loss_of_trl_is_accepted(loss: str) -> None:
    smoothing = {"dpo_label_smoothing": 0.001} if loss == "exo_pair" else {}
    assert as_config({**BASE, "dpo_loss_type": [loss], **smoothing}).dpo_loss_type == [loss]


def test_arguments_carry_only_the_keys_that_are_set() -> None:
    given = DPOStrategy.set_training_args_kwargs(as_config({**BASE, "rl_beta": 0.3, "dpo_ld_alpha": 0.0}))
    assert given == {"beta": 0.3, "ld_alpha": 0.0, "disable_dropout": True, "truncation_mode": "keep_start"}


def test_loss_names_are_trls() -> None:
    from trl import DPOConfig

    help_text = next(f.metadata["help"] for f in DPOConfig.__dataclass_fields__.values() if f.name == "loss_type")
    assert all(f"'{loss}'" in help_text for loss in LOSS_TYPES)


def test_the_strategy_loads_without_torch() -> None:
    code = "import sys, strategies.dpo, strategies.config, strategies; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
