"""Scores of single tokens: the values and gradients of a plain log_softmax, a piece of the logits at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from strategies.packing import head
from strategies.packing.head import add_token_scores, scores_tokens, token_outputs
from tests.laws.runs import FAMILIES, opinionated

EVERYTHING = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TOKENS, WIDTH, WORDS = 13, 8, 31


def inputs(with_bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Hidden states, weight, bias, labels and what flows back into the log-probabilities."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(TOKENS, WIDTH, generator=generator), torch.randn(WORDS, WIDTH, generator=generator)
    bias = torch.randn(WORDS, generator=generator) if with_bias else None
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    labels[:4] = (hidden[:4] @ weight.T + (0 if bias is None else bias)).argmax(dim=1)
    return hidden, weight, bias, labels, torch.randn(TOKENS, generator=generator)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Any:
    """All logits at once, in the precision of the inputs."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logps = logits.log_softmax(dim=1)
    probs = logps.exp()
    return SimpleNamespace(
        log_probs=logps.gather(1, labels[:, None])[:, 0],
        entropy=-(probs * logps).sum(dim=1),
        log_sum_sq_probs=(probs**2).sum(dim=1).log(),
        mean_logits=logits.mean(dim=1),
        is_top1=logits.argmax(dim=1) == labels,
    )


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [None if one is None else one.to(dtype or one.dtype).clone().requires_grad_() for one in tensors]


@pytest.fixture(params=[2**25, 70, 1], ids=["at once", "two tokens at a time", "token by token"])
def elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many logits may be held; of fewer than a token has, those of one token are."""
    monkeypatch.setattr(head, "ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_are_those_of_a_plain_softmax(elements: int, with_bias: bool) -> None:
    hidden, weight, bias, labels, _ = inputs(with_bias)
    found = token_outputs(hidden, weight, bias, labels, EVERYTHING)
    expected = plain(*(None if one is None else one.double() for one in (hidden, weight, bias)), labels)
    assert found.is_top1.tolist() == expected.is_top1.tolist()
    assert found.is_top1[:4].all() and not found.is_top1.all()
    for name in ("log_probs", *EVERYTHING[:3]):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)


def test_statistics_that_nobody_wants_are_not_computed() -> None:
    hidden, weight, bias, labels, _ = inputs()
    found = token_outputs(hidden, weight, bias, labels, ("entropy",))
    assert found.entropy is not None
    assert found.log_sum_sq_probs is found.mean_logits is found.is_top1 is None


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_those_of_a_plain_softmax(elements: int, with_bias: bool) -> None:
    hidden, weight, bias, labels, upstream = inputs(with_bias)
    ours, theirs = leaves(hidden, weight, bias), leaves(hidden, weight, bias, dtype=torch.float64)
    token_outputs(*ours, labels, EVERYTHING).log_probs.backward(upstream)
    plain(*theirs, labels).log_probs.backward(upstream.double())
    for left, right in zip(ours, theirs, strict=True):
        if left is not None:
            torch.testing.assert_close(left.grad.double(), right.grad, rtol=1e-5, atol=1e-5)


def test_under_a_frozen_head_the_gradient_reaches_the_hidden_states(elements: int) -> None:
    hidden, weight, bias, labels, upstream = inputs()
    (ours,), (theirs,) = leaves(hidden), leaves(hidden, dtype=torch.float64)
    token_outputs(ours, weight, bias, labels, EVERYTHING).log_probs.backward(upstream)
    plain(theirs, weight.double(), bias.double(), labels).log_probs.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    assert weight.grad is None


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_one_of_weight_and_bias_may_be_frozen(trained: str) -> None:
    hidden, weight, bias, labels, upstream = inputs()
    ours, theirs = leaves(weight if trained == "weight" else bias), leaves(weight if trained == "weight" else bias)
    for (leaf,), function in ((ours, token_outputs), (theirs, plain)):
        both = (leaf, bias) if trained == "weight" else (weight, leaf)
        function(hidden, *both, labels).log_probs.backward(upstream)
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_never_more_logits_are_held_than_allowed(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    hidden, weight, bias, labels, upstream = inputs()
    allowed, held, compute = 3 * WORDS, [], head._logits

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        logits = compute(*args, **kwargs)
        held.append(logits.numel())
        return logits

    monkeypatch.setattr(head, "ELEMENTS", allowed)
    monkeypatch.setattr(head, "_logits", counted)
    hidden.requires_grad_()
    token_outputs(hidden, weight if frozen else weight.requires_grad_(), bias, labels).log_probs.backward(upstream)
    assert max(held) == allowed
    assert sum(held) == TOKENS * WORDS * (1 if frozen else 2)


@pytest.mark.parametrize("frozen", [True, False])
def test_under_autocast_values_and_gradients_stay_within_the_precision_of_bfloat16(frozen: bool) -> None:
    """Products of 8 numbers of size 1, each rounded to 8 bits: logits of size 10 are off by some hundredths."""
    hidden, weight, bias, labels, upstream = inputs()
    ours, theirs = leaves(hidden, weight), leaves(hidden, weight)
    ours[1].requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = token_outputs(*ours, bias, labels, EVERYTHING)
    expected = plain(*theirs, bias, labels)
    found.log_probs.backward(upstream)
    expected.log_probs.backward(upstream)
    for name in ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=2e-2, atol=5e-2)
    for left, right in list(zip(ours, theirs, strict=True))[: 1 if frozen else 2]:
        assert left.grad.dtype == torch.float32
        torch.testing.assert_close(left.grad, right.grad, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_with_token_scores_answers_everything_else_as_before(family: str) -> None:
    model, ids = opinionated(family).eval(), torch.tensor([[5, 6, 7, 8]])
    before = model(input_ids=ids).logits
    assert not scores_tokens(model)
    add_token_scores(model)
    once = model.forward
    add_token_scores(model)
    assert scores_tokens(model) and model.forward is once
    assert torch.equal(model(input_ids=ids).logits, before)
    generated = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert generated[0, 4] == before[0, -1].argmax()
    found = model(input_ids=ids, scored_positions=torch.tensor([1, 3]), labels=torch.tensor([7, 9]))
    expected = before[0].log_softmax(dim=1)[[1, 3], [7, 9]]
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-5, atol=1e-5)
