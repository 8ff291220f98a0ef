"""Law 5: one forward of eight pairs and eight forwards of one pair are the same step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.laws.runs import LORA, losses, trained


@pytest.mark.parametrize("adapter", [{}, LORA], ids=["full", "lora"])
def test_eight_times_one_is_one_times_eight(tmp_path: Path, adapter: dict[str, object]) -> None:
    together = trained(tmp_path / "8x1", micro_batch_size=8, num_epochs=2.0, **adapter)
    apart = trained(tmp_path / "1x8", micro_batch_size=1, gradient_accumulation_steps=8, num_epochs=2.0, **adapter)
    assert len(losses(together)) == 4
    assert losses(apart) == pytest.approx(losses(together), rel=1e-4)
    for name in ("grad_norm", "rewards/chosen", "rewards/accuracies", "logps/rejected"):
        assert losses(apart, name) == pytest.approx(losses(together, name), rel=1e-3, abs=1e-6)
