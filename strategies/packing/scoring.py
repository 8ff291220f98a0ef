"""Log-probabilities of completions under one model, packed where it can take packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.batching import fill
from strategies.packing.layout import PairTokens, pack, pair_tokens
from strategies.packing.support import completion_logps, score_row, why_not_packed

__all__ = ["PairScorer"]

Logps = NDArray[np.float32]


class PairScorer:
    """Scores prepared pairs; no gradient, no logits in full.

    Args:
        model: in evaluation mode.
        tokens_per_forward: most tokens of one forward.
        autocast: dtype of the products, such as bfloat16; None computes in the weights' own.

    Attributes:
        forwards: how often the model has run so far.
        packed: whether rows hold several pairs; a model that can't take that scores one completion at a time.
    """

    def __init__(self, model: Any, tokens_per_forward: int, autocast: torch.dtype | None = None) -> None:
        self.model = model
        self.tokens_per_forward = tokens_per_forward
        self.autocast = autocast
        self.forwards = 0
        self.packed = why_not_packed(model, tokens_per_forward) is None

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Logps, Logps]]:
        """Log-probability of every completion token, float32, shapes (len(chosen_ids),) and (len(rejected_ids),).

        The first token of a completion without prompt is predicted by nothing and gets 0.

        Raises:
            ValueError: for a pair that is longer than `tokens_per_forward`.
        """
        found: dict[int, tuple[Logps, Logps]] = {}
        pairs = [pair_tokens(row) for row in rows]
        for places in fill([pair.tokens for pair in pairs], self.tokens_per_forward):
            with torch.no_grad(), self._autocast():
                scores = self._score_packed([pairs[place] for place in places]) if self.packed else None
            for index, place in enumerate(places):
                chosen, rejected = (
                    (scores[index], scores[len(places) + index]) if scores is not None else self._score_apart(rows[place])
                )
                found[place] = (_aligned(chosen, rows[place]["chosen_ids"]), _aligned(rejected, rows[place]["rejected_ids"]))
        return [found[place] for place in range(len(rows))]

    def _score_packed(self, pairs: list[PairTokens]) -> list[Tensor]:
        """Of the chosen completions, then of the rejected ones."""
        row = pack(pairs).to(self.model.device)
        self.forwards += 1
        return list(score_row(self.model, row).log_probs.float().cpu().split(row.mask.sum(dim=1).tolist()))

    def _score_apart(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        self.forwards += 2
        prompt = list(row["prompt_ids"])
        with torch.no_grad(), self._autocast():
            chosen, rejected = (completion_logps(self.model, prompt, list(row[name])) for name in COMPLETIONS)
        return chosen.cpu(), rejected.cpu()

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.model.device.type
        return nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)


COMPLETIONS = ("chosen_ids", "rejected_ids")


def _aligned(scores: Tensor, ids: Sequence[int]) -> Logps:
    """One score per token, 0 for a first one that nothing predicts."""
    missing = torch.zeros(len(ids) - len(scores))
    return torch.cat([missing, scores]).numpy()
