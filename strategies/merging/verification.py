"""Compares a merged model with its base and adapter.

Both are computed in float32 on the same sequences, base and adapter by PEFT. What is left between them is that merged weights
were rounded to the dtype that they are stored in, and the order of float32 sums. How much that may be is measured on the same
model and sequences: every weight that was rounded is moved once more, at random, as far as rounding may have moved it. A merged
model passes when its log-probabilities differ by no more than `MARGIN` times what that changes, in the largest difference and
in the root mean square. Both are random draws of one kind: correct merges of tiny models came to 0.9 to 1.4 times the measured
root mean square, and a wrong scale of one matrix of 14 to hundreds of times in float32. In half precisions rounding is so much
larger that a wrong scale of one matrix can pass. Where an adapter changes less than rounding does, no comparison of outputs can
distinguish right from wrong, and little of the adapter is left: `hides_adapter` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from strategies.models.config import from_folder

__all__ = ["Differences", "compare", "expected_logits"]

MARGIN = 3.0
SEED = 0


@dataclass(frozen=True)
class Distance:
    """How far log-probabilities of all tokens of the vocabulary are apart, over all positions, in nats."""

    largest: float
    rms: float


@dataclass(frozen=True)
class Differences:
    """What lies between base + adapter and the merged model; log-probabilities in nats."""

    sequences: int
    tokens: int
    """Positions that were compared."""
    logits: float
    """Largest absolute difference of a logit."""
    logps: Distance
    same_argmax: float
    """Fraction of positions at which both find the same token most probable."""
    rounding: Distance
    """What rounding once more changes."""
    adapter: Distance
    """What the adapter itself changes of the base."""

    @property
    def is_explained(self) -> bool:
        """Whether rounding explains the difference."""
        pairs = ((self.logps.largest, self.rounding.largest), (self.logps.rms, self.rounding.rms))
        return all(found <= MARGIN * allowed for found, allowed in pairs)

    @property
    def hides_adapter(self) -> bool:
        """Whether rounding changes at least half as much as the adapter does."""
        return self.logps.rms > 0.5 * self.adapter.rms


@dataclass(frozen=True)
class Expected:
    """What base and adapter compute: logits of each sequence, float32 (tokens, vocabulary), and how far the base is off."""

    sequences: Sequence[Sequence[int]]
    logits: list[Tensor]
    adapter: Distance


def expected_logits(policy: PeftModel, sequences: Sequence[Sequence[int]], advance: Callable[[], None]) -> Expected:
    """Compute the sequences with base and adapter, and with the base alone; `advance` is called after each of them."""
    logits = _logits(policy, sequences, advance)
    with policy.disable_adapter():
        return Expected(sequences, logits, _distance(logits, _logits(policy, sequences, advance)))


def compare(
    expected: Expected, folder: Path, rounded: Mapping[str, torch.dtype], advance: Callable[[], None], **arguments: Any
) -> Differences:
    """Compute the sequences twice with the merged model in `folder`, as transformers loads it, in float32.

    Args:
        rounded: names of the parameters that were rounded, and to what dtype.
        advance: called after each sequence.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: when the folder lacks weights of the model.
    """
    model, report = from_folder(str(folder), dtype=torch.float32, output_loading_info=True, **arguments)
    # transformers only warns of them, and draws them at random.
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the merged model lacks {len(missing)} weights, such as {missing[0]}")
    merged = _logits(model.eval(), expected.sequences, advance)
    _shake(model, rounded)
    rounding = _distance(_logits(model, expected.sequences, advance), merged)
    both = list(zip(merged, expected.logits, strict=True))
    tokens = sum(map(len, merged))
    largest = max((found - wanted).abs().max().item() for found, wanted in both)
    same = sum(int((found.argmax(-1) == wanted.argmax(-1)).sum()) for found, wanted in both) / tokens
    return Differences(len(both), tokens, largest, _distance(merged, expected.logits), same, rounding, expected.adapter)


@torch.no_grad()
def _logits(model: Any, sequences: Sequence[Sequence[int]], advance: Callable[[], None]) -> list[Tensor]:
    logits = []
    for sequence in sequences:
        # One at a time: padding would change the order of float32 sums.
        logits.append(model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].float())
        advance()
    return logits


def _distance(one: list[Tensor], other: list[Tensor]) -> Distance:
    largest, squares, count = 0.0, 0.0, 0
    for first, second in zip(one, other, strict=True):
        gap = (first.log_softmax(-1) - second.log_softmax(-1)).abs()
        # A gap that isn't a number must not be taken for none.
        largest = max(largest, gap.max().item() if torch.isfinite(gap).all() else float("inf"))
        squares += gap.double().square().sum().item()
        count += gap.numel()
    return Distance(largest, (squares / count) ** 0.5)


def _shake(model: torch.nn.Module, rounded: Mapping[str, torch.dtype]) -> None:
    """Move every weight of these parameters at random as far as rounding may have moved it, in place.

    That is half a unit in the last place. In float32 itself, where half of one would be rounded away, it is a whole one.
    """
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if name in rounded:
            facts, reach = torch.finfo(rounded[name]), 1.0 if rounded[name].itemsize >= 4 else 0.5
            # `frexp` has mantissas in [0.5, 1), and eps is the step at 1. Of 0 it gives the exponent 0, hence the clamp.
            exponent = torch.frexp(parameter.data.abs().clamp(min=facts.tiny)).exponent - 1
            step = torch.ldexp(torch.full_like(parameter, facts.eps), exponent)
            parameter.data += step * torch.empty_like(parameter).uniform_(-reach, reach, generator=generator)
