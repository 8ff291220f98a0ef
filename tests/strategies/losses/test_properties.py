"""What holds for any numbers: which way losses fall, what a swap does, and what changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies.losses import PAIR_LOSSES, LossOptions, PairLogps
from strategies.losses.table import LOSSES
from tests.strategies.losses.pairs import DIVERGENCES, OPTIONS, logps, shifted, swapped

number = st.floats(-40.0, -0.5)
lengths = st.integers(1, 30)
rows = st.lists(st.tuples(number, number, number, number, lengths, lengths), min_size=1, max_size=4)
some = settings(derandomize=True, deadline=None, max_examples=40)
Rows = list[tuple[float, float, float, float, int, int]]


def pairs_of(rows: Rows) -> tuple[PairLogps, PairLogps]:
    chosen, rejected, reference_chosen, reference_rejected, *sizes = zip(*rows, strict=True)
    return logps(chosen, rejected, *sizes), logps(reference_chosen, reference_rejected, *sizes)


def loss(name: str, pairs: tuple[PairLogps, PairLogps], options: LossOptions) -> Tensor:
    return PAIR_LOSSES[name](*pairs, options).detach()


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


# Not here, because they turn somewhere: ipo, sppo_hard, nca_pair, exo_pair, discopop and, in chosen, apo_down; and those
# with label smoothing but robust, whose two terms fall together.
FALLING = ["sigmoid", "hinge", "robust", "bco_pair", "aot", "aot_unpaired", "apo_zero", "sigmoid_norm", "simpo", "orpo"]


@some
@given(rows, st.floats(0.01, 20.0), st.integers(0, 3), st.sampled_from(DIVERGENCES))
@pytest.mark.parametrize("name", [*FALLING, "sft"])
def test_a_likelier_chosen_completion_costs_no_more(name: str, rows: Rows, step: float, index: int, divergence: str) -> None:
    policy, reference = pairs_of(rows)
    raised = torch.zeros(len(rows), dtype=torch.float64)
    raised[index % len(rows)] = min(step, -policy.chosen[index % len(rows)].item())
    options = LossOptions(label_smoothing=0.1 * (name == "robust"), f_divergence=divergence)
    before, after = (loss(name, (ours, reference), options).mean() for ours in (policy, shifted(policy, raised, 0.0)))
    assert after <= before + 1e-12
    if name not in ("hinge", "sigmoid_norm") and divergence == "reverse_kl":
        assert after < before


@some
@given(rows, st.floats(0.01, 20.0), st.integers(0, 3), st.sampled_from(DIVERGENCES))
@pytest.mark.parametrize("name", [*FALLING, "apo_down"])
def test_a_less_likely_rejected_completion_costs_no_more(
    name: str, rows: Rows, step: float, index: int, divergence: str
) -> None:
    policy, reference = pairs_of(rows)
    lowered = torch.zeros(len(rows), dtype=torch.float64)
    lowered[index % len(rows)] = -step
    options = LossOptions(label_smoothing=0.1 * (name == "robust"), f_divergence=divergence)
    before, after = (loss(name, (ours, reference), options).mean() for ours in (policy, shifted(policy, 0.0, lowered)))
    assert after <= before + 1e-12


@pytest.mark.parametrize(
    ("name", "options", "chosen"),
    [
        ("ipo", LossOptions(), [0.0, 25.0, 60.0]),
        ("sppo_hard", LossOptions(), [0.0, 5.0, 20.0]),
        ("nca_pair", LossOptions(), [0.0, 7.0, 40.0]),
        ("exo_pair", LossOptions(label_smoothing=0.1), [0.0, 22.0, 80.0]),
        ("sigmoid", LossOptions(label_smoothing=0.1), [0.0, 22.0, 80.0]),
        ("aot", LossOptions(label_smoothing=0.1), [0.0, 22.0, 80.0]),
        ("discopop", LossOptions(), [-10.0, -1.0, 0.5]),
        ("apo_down", LossOptions(), [-60.0, -20.0, 5.0]),
    ],
)
def test_not_monotone(name: str, options: LossOptions, chosen: list[float]) -> None:
    """The loss at the middle log-ratio of chosen is below those on either side."""
    low, middle, high = (loss(name, (logps([x], [5.0]), logps([0.0], [5.0])), options).item() for x in chosen)
    assert middle < low and middle < high


EPS, BETA = 0.2, 0.3


def ratios(pairs: tuple[PairLogps, PairLogps]) -> tuple[Tensor, Tensor]:
    policy, reference = pairs
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def difference(name: str, pairs: tuple[PairLogps, PairLogps], turned: tuple[PairLogps, PairLogps]) -> Tensor:
    options = LossOptions(beta=BETA, label_smoothing=EPS)
    return loss(name, turned, options) - loss(name, pairs, options)


@some
@given(rows, st.sampled_from(DIVERGENCES))
@pytest.mark.parametrize("name", ["sigmoid", "exo_pair", "aot", "aot_unpaired", "simpo"])
def test_a_swap_exchanges_right_and_wrong_labels(name: str, rows: Rows, divergence: str) -> None:
    """With gamma = 0; of `aot` the ranks turn too, so its losses are compared as a set."""
    policy, reference = pairs_of(rows)
    options = LossOptions(beta=BETA, label_smoothing=EPS, f_divergence=divergence, gamma=0.0)
    straight = loss(name, (policy, reference), options)
    turned = loss(name, (swapped(policy), swapped(reference)), replace(options, label_smoothing=1 - EPS))
    assert close(straight.sort().values, turned.sort().values)
    assert name == "aot" or close(straight, turned)


@some
@given(rows)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", lambda chosen, rejected, sizes: (1 - 2 * EPS) * BETA * (chosen - rejected)),
        ("robust", lambda chosen, rejected, sizes: BETA * (chosen - rejected) / (1 - 2 * EPS)),
        ("bco_pair", lambda chosen, rejected, sizes: BETA * (chosen - rejected)),
        ("sppo_hard", lambda chosen, rejected, sizes: 2 / BETA * (chosen - rejected)),
        ("ipo", lambda chosen, rejected, sizes: 2 / BETA * (chosen / sizes[0] - rejected / sizes[1])),
        ("sigmoid_norm", lambda chosen, rejected, sizes: BETA * (chosen / sizes[0] - rejected / sizes[1])),
    ],
)
def test_a_swap_adds_the_margin(name: str, expected: Callable[..., Tensor], rows: Rows) -> None:
    policy, reference = pairs_of(rows)
    found = difference(name, (policy, reference), (swapped(policy), swapped(reference)))
    assert close(found, expected(*ratios((policy, reference)), (policy.chosen_lengths, policy.rejected_lengths)))


@some
@given(rows)
def test_apo_zero_and_its_swap_make_two(rows: Rows) -> None:
    policy, reference = pairs_of(rows)
    both = (policy, reference), (swapped(policy), swapped(reference))
    total = sum(loss("apo_zero", pairs, LossOptions(beta=BETA)) for pairs in both)
    assert close(torch.as_tensor(total), torch.full((len(rows),), 2.0, dtype=torch.float64))


@some
@given(rows, st.floats(-500.0, 500.0), st.floats(-500.0, 500.0), st.sampled_from(DIVERGENCES))
@pytest.mark.parametrize("name", [name for name, traits in LOSSES.items() if traits.reference])
def test_what_policy_and_reference_share_changes_nothing(
    name: str, rows: Rows, chosen: float, rejected: float, divergence: str
) -> None:
    """A constant for each completion, or, for `aot`, which sorts before it subtracts, one for all pairs."""
    policy, reference = pairs_of(rows)
    spread = torch.arange(len(rows), dtype=torch.float64) if name != "aot" else torch.zeros(len(rows))
    moved = (shifted(policy, chosen + spread, rejected - spread), shifted(reference, chosen + spread, rejected - spread))
    options = replace(OPTIONS[name], f_divergence=divergence)
    straight = loss(name, (policy, reference), options)
    assert torch.allclose(loss(name, moved, options), straight, rtol=1e-6, atol=1e-6 * straight.abs().max().item())


@some
@given(rows, st.floats(-500.0, 500.0))
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "exo_pair", "robust", "aot", "aot_unpaired", "discopop"])
def test_losses_of_the_margin_ignore_what_chosen_and_rejected_share(name: str, rows: Rows, constant: float) -> None:
    policy, reference = pairs_of(rows)
    moved = shifted(policy, constant, constant)
    assert close(loss(name, (moved, reference), OPTIONS[name]), loss(name, (policy, reference), OPTIONS[name]))


@some
@given(rows, st.permutations(range(4)), st.sampled_from(DIVERGENCES))
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_the_mean_ignores_the_order_of_pairs(name: str, rows: Rows, order: list[int], divergence: str) -> None:
    turned = [rows[index] for index in order if index < len(rows)]
    options = replace(OPTIONS[name], f_divergence=divergence)
    straight, shuffled = (loss(name, pairs_of(each), options).mean() for each in (rows, turned))
    assert shuffled.item() == pytest.approx(straight.item(), rel=1e-9)
