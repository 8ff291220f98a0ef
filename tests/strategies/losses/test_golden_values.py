"""Losses on numbers computed apart from the code, to 30 digits; each fails when a sign flips or a factor is lost."""

from __future__ import annotations

import math

import pytest
import torch

from strategies.losses import PAIR_LOSSES, LossOptions, averaged, nll
from tests.strategies.losses.pairs import batch, gradients, logps, one_pair

THREE_PAIRS: list[tuple[str, LossOptions, list[float]]] = [
    ("sigmoid", LossOptions(), [0.554355244, 0.913015252, 0.474076984]),
    ("sigmoid", LossOptions(label_smoothing=0.1), [0.584355244, 0.873015252, 0.524076984]),
    ("hinge", LossOptions(), [0.7, 1.4, 0.5]),
    ("ipo", LossOptions(), [19.8661224, 31.640625, 12.8402778]),
    ("ipo", LossOptions(beta=0.5), [0.208979592, 2.640625, 0.173611111]),
    ("exo_pair", LossOptions(label_smoothing=0.001), [2.25819919, 3.46244917, 1.945734]),
    ("exo_pair", LossOptions(label_smoothing=0.1), [0.358383387, 0.747271568, 0.272054834]),
    ("nca_pair", LossOptions(), [1.31940663, 1.49377261, 1.2806023]),
    ("robust", LossOptions(), [0.554355244, 0.913015252, 0.474076984]),
    ("robust", LossOptions(label_smoothing=0.1), [0.516855244, 0.963015252, 0.411576984]),
    ("bco_pair", LossOptions(), [1.24253553, 1.5987519, 1.15249411]),
    ("sppo_hard", LossOptions(), [25.0, 100.0, 13.0]),
    ("sppo_hard", LossOptions(beta=0.5), [1.0, 20.0, 5.0]),
    ("aot", LossOptions(), [0.598138869, 0.693147181, 0.598138869]),
    ("aot", LossOptions(label_smoothing=0.2), [0.638138869, 0.693147181, 0.638138869]),
    ("aot_unpaired", LossOptions(), [0.64439666, 0.554355244, 0.693147181]),
    ("aot_unpaired", LossOptions(label_smoothing=0.2), [0.66439666, 0.614355244, 0.693147181]),
    ("apo_zero", LossOptions(), [0.925186815, 1.0994217, 0.875723486]),
    ("apo_down", LossOptions(), [0.975391481, 1.07370847, 0.951983186]),
    ("discopop", LossOptions(), [0.740357168, 0.913209356, 0.606524647]),
    ("discopop", LossOptions(discopop_tau=2), [0.654566013, 1.17357559, 0.548539328]),
    ("sft", LossOptions(), [2.23529412, 2.23529412, 2.23529412]),
    ("sigmoid_norm", LossOptions(beta=5), [0.0641499386, 3.16799908, 0.000838620169]),
    ("simpo", LossOptions(), [0.974076984, 0.943248946, 0.913015252]),
    ("simpo", LossOptions(beta=2, gamma=1), [1.31326169, 0.693147181, 0.313261688]),
    ("simpo", LossOptions(beta=2, gamma=1, label_smoothing=0.1), [1.21326169, 0.693147181, 0.413261688]),
    ("orpo", LossOptions(), [2.06931472, 2.54611613, 2.02887508]),
    ("orpo", LossOptions(beta=0.5), [2.34657359, 2.73058063, 2.14437539]),
    ("sigmoid", LossOptions(f_divergence="forward_kl"), [0.572316289, 0.835446714, 0.392055798]),
    ("hinge", LossOptions(f_divergence="forward_kl"), [0.741705345, 1.26684948, 0.266073097]),
    ("ipo", LossOptions(f_divergence="forward_kl"), [20.9910423, 28.8707845, 6.93143259]),
    ("exo_pair", LossOptions(f_divergence="forward_kl", label_smoothing=0.1), [0.377996859, 0.665366478, 0.187901303]),
    ("robust", LossOptions(f_divergence="forward_kl", label_smoothing=0.1), [0.540029458, 0.868802898, 0.300314935]),
    ("discopop", LossOptions(f_divergence="forward_kl"), [0.771232212, 0.837698647, 0.480020254]),
    ("sigmoid_norm", LossOptions(f_divergence="forward_kl"), [0.672445901, 0.711978928, 0.581773729]),
    ("sigmoid", LossOptions(f_divergence="js_divergence"), [0.635588701, 0.758378818, 0.594619833]),
    ("hinge", LossOptions(f_divergence="js_divergence"), [0.881366632, 1.12646743, 0.792165934]),
    ("ipo", LossOptions(f_divergence="js_divergence"), [23.0224198, 26.8836127, 19.0177375]),
    ("exo_pair", LossOptions(f_divergence="js_divergence", label_smoothing=0.1), [0.447492051, 0.58219778, 0.402440633]),
    ("robust", LossOptions(f_divergence="js_divergence", label_smoothing=0.1), [0.62075953, 0.774187247, 0.568640574]),
    ("discopop", LossOptions(f_divergence="js_divergence"), [0.86659614, 0.786169474, 0.808984982]),
    ("sigmoid_norm", LossOptions(f_divergence="js_divergence"), [0.683106519, 0.702436981, 0.661704257]),
    ("sigmoid", LossOptions(f_divergence="alpha_divergence"), [0.573243446, 0.845833608, 0.474443183]),
    ("hinge", LossOptions(f_divergence="alpha_divergence"), [0.743831634, 1.28511822, 0.500969666]),
    ("ipo", LossOptions(f_divergence="alpha_divergence"), [20.8100452, 29.3887256, 12.01346]),
    (
        "exo_pair",
        LossOptions(f_divergence="alpha_divergence", label_smoothing=0.1),
        [0.379011233, 0.676449605, 0.272441745],
    ),
    ("robust", LossOptions(f_divergence="alpha_divergence", label_smoothing=0.1), [0.5412224, 0.881473386, 0.412064391]),
    ("discopop", LossOptions(f_divergence="alpha_divergence"), [0.772822958, 0.847444141, 0.607112936]),
    ("sigmoid_norm", LossOptions(f_divergence="alpha_divergence"), [0.671477324, 0.714425706, 0.619387771]),
    ("sigmoid", LossOptions(f_divergence="alpha_divergence", alpha=0.3), [0.574867132, 0.837337155, 0.451183971]),
    ("sigmoid", LossOptions(f_divergence="alpha_divergence", alpha=2), [0.402483879, 2.10210151, 0.127522926]),
    ("sigmoid", LossOptions(f_divergence="alpha_divergence", alpha=0.99999), [0.554355883, 0.913012858, 0.474077928]),
]


@pytest.mark.parametrize(("name", "options", "expected"), THREE_PAIRS)
def test_three_pairs(name: str, options: LossOptions, expected: list[float]) -> None:
    loss = PAIR_LOSSES[name](*batch(), options)
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx(expected, rel=1e-8)


def test_every_loss_has_values() -> None:
    assert {name for name, _, _ in THREE_PAIRS} == set(PAIR_LOSSES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("sigmoid", LossOptions(), 0.554355),
        ("sigmoid", LossOptions(label_smoothing=0.1), 0.584355),
        ("hinge", LossOptions(), 0.7),
        ("ipo", LossOptions(), 19.866122),
        ("exo_pair", LossOptions(label_smoothing=1e-3), 2.258199),
        ("nca_pair", LossOptions(), 1.319407),
        ("robust", LossOptions(label_smoothing=0.1), 0.516855),
        ("bco_pair", LossOptions(), 1.242536),
        ("sppo_hard", LossOptions(), 25.0),
        ("aot", LossOptions(), 0.554355),
        ("aot_unpaired", LossOptions(), 0.554355),
        ("apo_zero", LossOptions(), 0.925187),
        ("apo_down", LossOptions(), 0.975391),
        ("discopop", LossOptions(), 0.740357),
        ("sft", LossOptions(), 2.0),
        ("sigmoid_norm", LossOptions(beta=5), 0.064150),
        ("simpo", LossOptions(beta=2, gamma=1), 1.313262),
        ("orpo", LossOptions(), 2.069315),
    ],
)
def test_one_pair(name: str, options: LossOptions, expected: float, dtype: torch.dtype) -> None:
    policy, reference = logps([-10.0], [-14.0], dtype=dtype), logps([-12.0], [-13.0], dtype=dtype)
    loss = PAIR_LOSSES[name](policy, reference, options)
    assert loss.shape == (1,) and loss.dtype == dtype
    assert loss.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("policy", "reference", "expected"),
    [((-10.0, -14.0), (-11.0, -13.0), 0.598139), ((-14.0, -10.0), (-13.0, -11.0), 0.798139)],
)
def test_a_flipped_pair_costs_more(policy: tuple[float, float], reference: tuple[float, float], expected: float) -> None:
    ours, theirs = (logps([chosen], [rejected]) for chosen, rejected in (policy, reference))
    assert PAIR_LOSSES["sigmoid"](ours, theirs, LossOptions()).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", math.log(2)),
        ("hinge", 1.0),
        ("ipo", 25.0),
        ("exo_pair", -0.5 * math.log(4 * 0.9 * 0.1)),
        ("nca_pair", 2 * math.log(2)),
        ("robust", math.log(2)),
        ("bco_pair", 2 * math.log(2)),
        ("sppo_hard", 50.0),
        ("aot", math.log(2)),
        ("aot_unpaired", math.log(2)),
        ("apo_zero", 1.0),
        ("apo_down", 1.0),
        ("discopop", 0.5 * math.log(2) + 0.5),
        ("sigmoid_norm", math.log(2)),
    ],
)
def test_where_policy_equals_reference(name: str, expected: float, divergence: str) -> None:
    policy, _ = batch()
    loss = PAIR_LOSSES[name](policy, policy, LossOptions(label_smoothing=0.1, f_divergence=divergence))
    assert loss.tolist() == pytest.approx([expected] * 3, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "chosen", "rejected"),
    [
        ("sigmoid", LossOptions(), -0.04255575, 0.04255575),
        ("hinge", LossOptions(), -0.1, 0.1),
        ("ipo", LossOptions(), -2 * 4.45714286 / 5, 2 * 4.45714286 / 7),
        ("sppo_hard", LossOptions(), -6.0, 8.0),
        ("sft", LossOptions(), -0.2, 0.0),
    ],
)
def test_gradient(name: str, options: LossOptions, chosen: float, rejected: float) -> None:
    policy, reference = one_pair()
    found = gradients(PAIR_LOSSES[name](policy, reference, options), policy)
    assert [value.item() for value in found] == pytest.approx([chosen, rejected], abs=1e-7)


@pytest.mark.parametrize(
    ("name", "options", "chosen"),
    [
        ("sigmoid", LossOptions(label_smoothing=0.1), math.log(9) / 0.1),
        ("exo_pair", LossOptions(label_smoothing=0.1), math.log(9) / 0.1),
        ("aot", LossOptions(label_smoothing=0.1), math.log(9) / 0.1),
        ("aot_unpaired", LossOptions(label_smoothing=0.1), math.log(9) / 0.1),
        ("ipo", LossOptions(beta=0.5), 5.0),
        ("sppo_hard", LossOptions(beta=0.5), 1.0),
        ("nca_pair", LossOptions(), math.log(2) / 0.1),
        ("simpo", LossOptions(beta=2, gamma=1, label_smoothing=0.1), 5 * (math.log(9) + 1) / 2),
    ],
)
def test_optimum(name: str, options: LossOptions, chosen: float) -> None:
    """The log-ratio of chosen at which the loss stops pulling, where rejected stays at the reference."""
    policy, reference = logps([chosen], [0.0]), logps([0.0], [0.0])
    slope, _ = gradients(PAIR_LOSSES[name](policy, reference, options), policy)
    assert slope.item() == pytest.approx(0.0, abs=1e-12)


def test_nll_averages_each_completion() -> None:
    policy, _ = batch()
    assert nll(policy).tolist() == pytest.approx([2.0, 2.5, 2.0])


def test_sft_of_one_token() -> None:
    assert PAIR_LOSSES["sft"](logps([-3.0], [-1.0], [1], [1]), None, LossOptions()).tolist() == [3.0]


def test_averaged_keeps_lengths() -> None:
    policy = logps([-10.0, 0.0, -3.0], [-14.0, -3.0, -0.5], (5, 0, 1), (7, 3, 1))
    average = averaged(policy)
    assert average.chosen.tolist() == [-2.0, 0.0, -3.0] and average.rejected.tolist() == [-2.0, -1.0, -0.5]
    assert average.chosen_lengths is policy.chosen_lengths and average.rejected_lengths is policy.rejected_lengths
