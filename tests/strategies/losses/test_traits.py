"""The table of what each loss reads, held to what the losses do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from strategies.keys import options_of
from strategies.losses import F_DIVERGENCES, PAIR_LOSSES, LossOptions, PairLogps
from strategies.losses import table as table
from strategies.losses.table import LOSSES
from strategies.methods.registry import BuiltInKeys
from tests.strategies.losses.pairs import OPTIONS, batch, shifted

OTHER_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("beta", {"beta": 0.3}),
    ("label_smoothing", {"label_smoothing": 0.2}),
    ("f_divergence", {"f_divergence": "forward_kl"}),
    ("f_divergence", {"f_divergence": "js_divergence"}),
    ("f_divergence", {"f_divergence": "alpha_divergence"}),
    ("gamma", {"gamma": 0.7}),
    ("discopop_tau", {"discopop_tau": 0.5}),
]


def loss(name: str, options: LossOptions, policy: PairLogps | None = None, reference: PairLogps | None = None) -> list[float]:
    ours, theirs = batch()
    return PAIR_LOSSES[name](policy or ours, reference or theirs, options).tolist()


def pair_of(pairs: PairLogps, index: int) -> PairLogps:
    cut = slice(index, index + 1)
    return PairLogps(pairs.chosen[cut], pairs.rejected[cut], pairs.chosen_lengths[cut], pairs.rejected_lengths[cut])


def test_names_are_the_same_in_the_same_order() -> None:
    assert list(LOSSES) == list(PAIR_LOSSES)
    assert list(table.F_DIVERGENCES) == list(F_DIVERGENCES)


def test_the_table_names_options() -> None:
    """What losses read are the fields of the options, and what keys set; `test_reads` changes all of it."""
    fields = set(LossOptions.__dataclass_fields__) - {"own"}
    keys = set(options_of(BuiltInKeys).values())
    read = set().union(*(traits.reads for traits in LOSSES.values()))
    assert read | {"alpha"} == fields | keys == keys
    assert read == {option for option, _ in OTHER_VALUES}


@pytest.mark.parametrize(("option", "change"), OTHER_VALUES)
@pytest.mark.parametrize("name", LOSSES)
def test_reads(name: str, option: str, change: dict[str, Any]) -> None:
    changed = loss(name, OPTIONS[name]) != loss(name, replace(OPTIONS[name], **change))
    assert changed == (option in LOSSES[name].reads)


@pytest.mark.parametrize("name", LOSSES)
def test_alpha_belongs_to_its_divergence(name: str) -> None:
    assert loss(name, OPTIONS[name]) == loss(name, replace(OPTIONS[name], alpha=0.3))
    options = replace(OPTIONS[name], f_divergence="alpha_divergence")
    assert (loss(name, options) != loss(name, replace(options, alpha=0.3))) == ("f_divergence" in LOSSES[name].reads)


@pytest.mark.parametrize("name", [name for name, traits in LOSSES.items() if traits.reference])
def test_needs_a_reference(name: str) -> None:
    policy, reference = batch()
    with pytest.raises(AssertionError, match="with a reference"):
        PAIR_LOSSES[name](policy, None, OPTIONS[name])
    changed = shifted(reference, torch.tensor([1.0, -2.0, 3.0]), 0.0)
    assert loss(name, OPTIONS[name], reference=changed) != loss(name, OPTIONS[name])


@pytest.mark.parametrize("name", [name for name, traits in LOSSES.items() if not traits.reference])
def test_reads_no_reference(name: str) -> None:
    policy, _ = batch()
    assert PAIR_LOSSES[name](policy, None, OPTIONS[name]).tolist() == loss(name, OPTIONS[name])


@pytest.mark.parametrize("name", LOSSES)
def test_couples(name: str) -> None:
    policy, reference = batch()
    alone = [loss(name, OPTIONS[name], pair_of(policy, i), pair_of(reference, i))[0] for i in range(3)]
    assert (loss(name, OPTIONS[name]) != pytest.approx(alone, rel=1e-12)) == LOSSES[name].couples


@pytest.mark.parametrize("name", LOSSES)
def test_lengths(name: str) -> None:
    policy, _ = batch()
    longer = replace(policy, chosen_lengths=policy.chosen_lengths + 2, rejected_lengths=policy.rejected_lengths + 5)
    assert (loss(name, OPTIONS[name], longer) != loss(name, OPTIONS[name])) == LOSSES[name].lengths


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 0.7])
def test_robust_refuses_labels_that_say_nothing(smoothing: float) -> None:
    with pytest.raises(AssertionError, match=r"label_smoothing in \[0, 0\.5\)"):
        loss("robust", LossOptions(label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_exo_refuses_certain_labels(smoothing: float) -> None:
    with pytest.raises(AssertionError, match=r"label_smoothing in \(0, 1\)"):
        loss("exo_pair", LossOptions(label_smoothing=smoothing))


def test_the_table_loads_without_torch() -> None:
    code = "import sys, strategies.losses.table; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "exo_pair"])
def test_target(name: str) -> None:
    """A margin that grows without end raises the loss. EXO needs smoothed labels, and these set a target of any loss."""
    policy, _ = batch()
    far, options = replace(policy, rejected=policy.rejected - 1e4), replace(OPTIONS[name], label_smoothing=0.0)
    losses = zip(loss(name, options, far), loss(name, options), strict=True)
    assert all(beyond > now for beyond, now in losses) == LOSSES[name].target
