"""Losses on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps


def pair(chosen: float, rejected: float) -> PairLogps:
    values = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (chosen, rejected, 5.0, 7.0))
    return PairLogps(*values)


@pytest.mark.parametrize(
    ("policy", "reference", "smoothing", "expected"),
    [
        ((-10.0, -14.0), (-12.0, -13.0), 0.0, 0.554355),
        ((-10.0, -14.0), (-12.0, -13.0), 0.1, 0.584355),
        ((-10.0, -14.0), (-11.0, -13.0), 0.0, 0.598139),
        ((-14.0, -10.0), (-13.0, -11.0), 0.0, 0.798139),
        ((-10.0, -14.0), (-10.0, -14.0), 0.1, math.log(2)),
    ],
)
def test_sigmoid(policy: tuple[float, float], reference: tuple[float, float], smoothing: float, expected: float) -> None:
    loss = PAIR_LOSSES["sigmoid"](pair(*policy), pair(*reference), LossOptions(0.1, smoothing))
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_sigmoid_gradient_raises_chosen() -> None:
    policy = pair(-10, -14)
    PAIR_LOSSES["sigmoid"](policy, pair(-12, -13), LossOptions(beta=0.1)).sum().backward()
    assert policy.chosen.grad.item() == pytest.approx(-0.04255575, abs=1e-7)
    assert policy.rejected.grad.item() == pytest.approx(0.04255575, abs=1e-7)


def test_conservative_optimum() -> None:
    """beta x margin = ln((1 - eps) / eps) is where label smoothing stops pulling."""
    eps, beta = 0.1, 0.1
    policy = pair(-10 + math.log((1 - eps) / eps) / beta, -10)
    PAIR_LOSSES["sigmoid"](policy, pair(-10, -10), LossOptions(beta, eps)).sum().backward()
    assert policy.chosen.grad.item() == pytest.approx(0.0, abs=1e-12)
