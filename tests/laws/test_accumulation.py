"""Law 5: one forward of eight rows and eight forwards of one row are the same step.

For KTO this holds because its KL term is that of the optimizer step, not of the forward.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.laws.runs import FAMILIES, LORA, losses, opinionated, same_history, trained


@pytest.mark.parametrize(
    "keys",
    [
        {"rl": "kto"},
        {"sample_packing": False},
        {"sample_packing": False, **LORA},
        {"sample_packing": False, "rl": "ipo", "rpo_alpha": 0.1},
        {"sample_packing": False, "dpo_loss_type": ["aot"]},
        {"sample_packing": False, "dpo_loss_type": ["sigmoid", "sft"], "dpo_use_weighting": True},
    ],
    ids="kto padded padded-lora padded-ipo padded-aot padded-sft".split(),
)
def test_eight_times_one_is_one_times_eight(tmp_path: Path, keys: dict[str, Any]) -> None:
    together = trained(tmp_path / "8x1", micro_batch_size=8, num_epochs=2.0, **keys)
    apart = trained(tmp_path / "1x8", micro_batch_size=1, gradient_accumulation_steps=8, num_epochs=2.0, **keys)
    assert len(losses(together)) == 4
    assert losses(apart) == pytest.approx(losses(together), rel=1e-4)
    for name in ("grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected", "logits/chosen", "entropy"):
        assert losses(apart, name) == pytest.approx(losses(together, name), rel=1e-3, abs=1e-6)


LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {"rl": "ipo", "rpo_alpha": 0.1},
    "simpo": {"rl": "simpo", "cpo_alpha": 0.1},
    "orpo": {"rl": "orpo"},
}
CASES = [(family, adapter, loss) for family in FAMILIES for adapter in ("full", "lora") for loss in LOSSES]
COUPLED = [("llama", "full", loss) for loss in ("aot", "aot_unpaired", "sft")]


@pytest.mark.parametrize(("family", "adapter", "loss"), [*CASES, *COUPLED])
def test_packed_forwards_of_one_pair_are_one_forward_of_eight(tmp_path: Path, family: str, adapter: str, loss: str) -> None:
    """The size of a packed forward is `tokens_per_forward`, whatever the micro batch."""
    keys = {"micro_batch_size": 8, "num_epochs": 2.0, **(LORA if adapter == "lora" else {})}
    keys |= LOSSES.get(loss, {"dpo_loss_type": ["sigmoid", "sft"] if loss == "sft" else [loss]})
    together = trained(tmp_path / "one", model=opinionated(family), tokens_per_forward=1000, **keys)
    apart = trained(tmp_path / "eight", model=opinionated(family), tokens_per_forward=50, **keys)
    for trainer, forwards in ((together, 1), (apart, 8)):
        assert {len(share.batches) for share in trainer.get_train_dataloader()} == {forwards}
    same_history(apart, together)
