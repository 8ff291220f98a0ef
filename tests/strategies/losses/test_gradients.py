"""Gradients against finite differences, and finite ones at the ends of the range."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps, nll
from strategies.losses.table import LOSSES
from tests.strategies.losses.pairs import DIVERGENCES, OPTIONS, batch, corners, gradients, logps

VARIANTS = [
    *OPTIONS.items(),
    ("sigmoid", LossOptions()),
    ("discopop", LossOptions(beta=0.7, discopop_tau=1.5)),
    ("sigmoid_norm", LossOptions(beta=5)),
    ("simpo", LossOptions(beta=2, gamma=1)),
    *(
        (name, replace(OPTIONS[name], f_divergence=divergence, alpha=alpha))
        for name, traits in LOSSES.items()
        if "f_divergence" in traits.reads
        for divergence, alpha in [("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.3)]
    ),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_gradient_is_the_slope(name: str, options: LossOptions) -> None:
    policy, reference = batch()

    def loss(*tensors: Tensor) -> Tensor:
        ours, theirs = replace(policy, chosen=tensors[0], rejected=tensors[1]), replace(reference, chosen=tensors[2])
        return PAIR_LOSSES[name](ours, replace(theirs, rejected=tensors[3]), options)

    assert torch.autograd.gradcheck(loss, (policy.chosen, policy.rejected, reference.chosen, reference.rejected))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_finite_at_the_corners(name: str, divergence: str) -> None:
    policy, reference = corners(torch.float32)
    for alpha in (-1.0, 0.0, 0.5, 0.99, 1.0, 2.0):
        for beta, tau in [(1e-3, 0.01), (0.1, 0.05), (10.0, 3.0)]:
            options = LossOptions(beta, 0.1, divergence, alpha, discopop_tau=tau)
            assert_finite(name, policy, reference, options)


log_probability = st.floats(-1e4, 0.0, width=32)
length = st.integers(0, 4096)
pairs = st.lists(st.tuples(*[log_probability] * 4, length, length), min_size=1, max_size=4)
options_of_any_strength = st.builds(
    LossOptions,
    beta=st.floats(1e-3, 10.0),
    label_smoothing=st.floats(1e-3, 0.45),
    f_divergence=st.sampled_from(DIVERGENCES),
    alpha=st.floats(-1.0, 2.0),
    gamma=st.floats(0.0, 5.0),
    discopop_tau=st.floats(0.01, 3.0),
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(pairs, options_of_any_strength)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_finite_everywhere(name: str, rows: list[tuple[float, ...]], options: LossOptions) -> None:
    chosen, rejected, reference_chosen, reference_rejected, *lengths = zip(*rows, strict=True)
    sizes = [[int(size) for size in column] for column in lengths]
    policy = logps(chosen, rejected, *sizes, dtype=torch.float32)
    reference = logps(reference_chosen, reference_rejected, *sizes, dtype=torch.float32)
    assert_finite(name, policy, reference, options)


def assert_finite(name: str, policy: PairLogps, reference: PairLogps, options: LossOptions) -> None:
    loss = PAIR_LOSSES[name](policy, reference, options)
    assert loss.shape == policy.chosen.shape
    assert loss.isfinite().all(), options
    assert all(slope.isfinite().all() for slope in gradients(loss, policy)), options


def test_a_certain_completion_has_finite_odds() -> None:
    policy = logps([0.0, -1e-9, -5.0], [-5.0, 0.0, 0.0], (1, 1, 1), (1, 1, 1), dtype=torch.float32)
    loss = PAIR_LOSSES["orpo"](policy, None, LossOptions())
    assert loss.isfinite().all() and all(slope.isfinite().all() for slope in gradients(loss, policy))


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_a_collapsed_completion_is_pulled_back(divergence: str) -> None:
    """Past the largest exponent the score goes on along its tangent, and keeps its slope."""
    policy, reference = logps([-200.0], [-14.0]), logps([0.0], [-14.0])
    slope, _ = gradients(PAIR_LOSSES["sigmoid"](policy, reference, LossOptions(f_divergence=divergence)), policy)
    assert slope.item() < 0


@pytest.mark.parametrize("margin", [-590.0, -300.0, -20.0, 0.0, 0.3, 20.0, 590.0])
@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_discopop_is_its_formula_up_to_sixty(margin: float, tau: float) -> None:
    policy, reference = logps([margin], [0.0]), logps([0.0], [0.0])
    x = torch.tensor(0.1 * margin, dtype=torch.float64)
    blend = torch.sigmoid(x / tau)
    expected = torch.log1p(torch.exp(-x)) * (1 - blend) + torch.exp(-x) * blend
    found = PAIR_LOSSES["discopop"](policy, reference, LossOptions(discopop_tau=tau))
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_empty_completions_count_as_one_token() -> None:
    empty, one = (logps([0.0], [0.0], [size], [size]) for size in (0, 1))
    assert nll(empty).tolist() == nll(one).tolist() == [0.0]
    for name, options in OPTIONS.items():
        assert PAIR_LOSSES[name](empty, empty, options).tolist() == PAIR_LOSSES[name](one, one, options).tolist()
