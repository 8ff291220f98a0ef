"""Law 7: swapping chosen and rejected negates the margins, and turns the accuracy round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps
from tests.laws.runs import trained
from tests.tiny import prepared_pairs


def swapped(rows: list[dict]) -> list[dict]:
    return [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]


def test_swapped_rows_negate_margins(tmp_path: Path) -> None:
    rows = prepared_pairs(16)
    trainer = trained(tmp_path, rows=rows, micro_batch_size=4)
    straight, turned = trainer.evaluate(rows), trainer.evaluate(swapped(rows))
    assert straight["eval_rewards/margins"] > 0.1
    assert turned["eval_rewards/margins"] == pytest.approx(-straight["eval_rewards/margins"], rel=1e-4)
    assert turned["eval_rewards/chosen"] == pytest.approx(straight["eval_rewards/rejected"], rel=1e-4)
    assert turned["eval_rewards/accuracies"] == pytest.approx(1 - straight["eval_rewards/accuracies"])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_swapping_mirrors_the_sigmoid_loss(smoothing: float) -> None:
    """loss(swapped, eps) = loss(straight, 1 - eps), so their difference is (1 - 2 eps) x margin."""
    lengths = torch.tensor([5.0])
    policy = PairLogps(torch.tensor([-10.0]), torch.tensor([-14.0]), lengths, lengths)
    reference = PairLogps(torch.tensor([-12.0]), torch.tensor([-13.0]), lengths, lengths)
    turn = lambda logps: PairLogps(logps.rejected, logps.chosen, lengths, lengths)  # noqa: E731
    options = LossOptions(beta=0.1, label_smoothing=smoothing)
    straight = PAIR_LOSSES["sigmoid"](policy, reference, options)
    turned = PAIR_LOSSES["sigmoid"](turn(policy), turn(reference), options)
    assert (turned - straight).item() == pytest.approx((1 - 2 * smoothing) * 0.1 * 3.0, rel=1e-5)
