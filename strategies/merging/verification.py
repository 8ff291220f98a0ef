"""Whether a merged model says what its base says with the adapter.

Both are computed in float32 on the same sequences, base and adapter by PEFT. What is left between them is that merged weights
were rounded to the dtype that they are stored in, and the order of float32 sums. How much that may be is measured on the same
model and sequences: every weight that was rounded is moved once more, at random, as far as rounding may have moved it. A merged
model passes when its log-probabilities differ by no more than `MARGIN` times what that changes, in the largest difference and
in the root mean square. Both are random draws of one kind: correct merges of tiny models came to 0.9 to 1.4 times the measured
root mean square, and a wrong scale of one matrix of 14 to hundreds of times in float32. In half precisions rounding is so much
larger that a wrong scale of one matrix can pass. Where an adapter changes less than rounding does, no comparison of outputs can
tell right from wrong, and little of the adapter is left: `hides_adapter` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from strategies.merging.weights import plain
from strategies.models import load_model

__all__ = ["Differences", "compare", "expected_logits", "memory_needed"]

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
    """What base and adapter say: logits of each sequence, float32 (tokens, vocabulary), and how far the base alone is off."""

    sequences: Sequence[Sequence[int]]
    logits: list[torch.Tensor]
    adapter: Distance


class _Apart:
    """Adds up distances."""

    def __init__(self) -> None:
        self.largest, self._squares, self._count = 0.0, 0.0, 0

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        gap = (first.log_softmax(-1) - second.log_softmax(-1)).abs()
        # A gap that isn't a number must not be taken for none.
        self.largest = float("inf") if not torch.isfinite(gap).all() else max(self.largest, gap.max().item())
        self._squares += gap.double().square().sum().item()
        self._count += gap.numel()

    def distance(self) -> Distance:
        return Distance(self.largest, (self._squares / self._count) ** 0.5)


def memory_needed(parameters: int, sequences: Sequence[Sequence[int]], vocabulary: int) -> int:
    """Bytes that a comparison takes: one model in float32, and logits."""
    longest = max(map(len, sequences))
    return 4 * (parameters + vocabulary * (sum(map(len, sequences)) + 4 * longest))


@torch.no_grad()
def expected_logits(
    cfg: Any, adapter: Path, grown_to: int | None, sequences: Sequence[Sequence[int]], advance: Callable[[], None]
) -> Expected:
    """Compute the sequences with the base model of `cfg` and the adapter beside it, in float32.

    Args:
        grown_to: tokens of the vocabulary, where the adapter's folder brings embeddings for more than the base has.
        advance: called after each sequence.
    """
    base = load_model(plain(cfg))
    if grown_to is not None:
        base.resize_token_embeddings(grown_to, mean_resizing=False)
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    logits, apart = [], _Apart()
    for sequence in sequences:
        logits.append(_logits(model, sequence))
        with model.disable_adapter():
            apart.add(logits[-1], _logits(model, sequence))
        advance()
    return Expected(sequences, logits, apart.distance())


@torch.no_grad()
def compare(
    expected: Expected, folder: Path, rounded: Mapping[str, torch.dtype], advance: Callable[[], None], **arguments: Any
) -> Differences:
    """Compute the sequences with the merged model in `folder`, as transformers loads it, in float32.

    Args:
        rounded: names of the parameters that were rounded, and to what dtype.
        advance: called after each sequence.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: when the folder lacks weights of the model.
    """
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **arguments)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the merged model lacks {len(missing)} weights, such as {missing[0]}")
    model.eval()
    merged = []
    logits, same, apart, rounding = 0.0, 0, _Apart(), _Apart()
    for sequence, wanted in zip(expected.sequences, expected.logits, strict=True):
        merged.append(_logits(model, sequence))
        logits = max(logits, (merged[-1] - wanted).abs().max().item())
        same += int((merged[-1].argmax(-1) == wanted.argmax(-1)).sum())
        apart.add(merged[-1], wanted)
        advance()
    _shake(model, rounded)
    for sequence, found in zip(expected.sequences, merged, strict=True):
        rounding.add(_logits(model, sequence), found)
        advance()
    tokens = sum(map(len, expected.sequences))
    return Differences(len(merged), tokens, logits, apart.distance(), same / tokens, rounding.distance(), expected.adapter)


def _logits(model: Any, sequence: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].float()


def _shake(model: torch.nn.Module, rounded: Mapping[str, torch.dtype]) -> None:
    """Move every weight of these parameters at random as far as rounding may have moved it, in place.

    That is half a unit in the last place. In float32 itself, where half of one would be rounded away, it is a whole one.
    """
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        if name in rounded:
            facts, reach = torch.finfo(rounded[name]), 1.0 if rounded[name].itemsize >= 4 else 0.5
            exponent = torch.frexp(parameter.data.abs().clamp(min=facts.tiny)).exponent - 1
            step = torch.ldexp(torch.full_like(parameter, facts.eps), exponent)
            parameter.data += step * torch.empty_like(parameter).uniform_(-reach, reach, generator=generator)
