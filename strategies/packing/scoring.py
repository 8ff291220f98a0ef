"""Log-probabilities of completions under one model, packed where it can take packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import add_fused_lm_head

from strategies.batching import fill
from strategies.packing.layout import PairTokens, pack, pair_tokens
from strategies.packing.support import score_row, why_not_packed

__all__ = ["PairScorer"]

Logps = NDArray[np.float32]


class PairScorer:
    """Scores prepared pairs; no gradient, no logits in full.

    Args:
        model: in evaluation mode.
        tokens_per_forward: most tokens of one forward.
        autocast: dtype of the products, such as bfloat16; None computes in the weights' own.
        longest: tokens of the longest sequence of prompt and completion; `tokens_per_forward` when not known.

    Attributes:
        forwards: how often the model has run so far.
        padded_because: why pairs are scored one by one, their two sequences padded; None where rows hold several pairs.
    """

    def __init__(
        self, model: Any, tokens_per_forward: int, autocast: torch.dtype | None = None, longest: int | None = None
    ) -> None:
        self.model = model
        self.tokens_per_forward = tokens_per_forward
        self.autocast = autocast
        self.forwards = 0
        self.padded_because = why_not_packed(model, longest if longest is not None else tokens_per_forward)
        if self.padded_because is not None:
            add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Logps, Logps]]:
        """Log-probability of every completion token, float32, shapes (len(chosen_ids),) and (len(rejected_ids),).

        The first token of a completion without prompt is predicted by nothing and gets 0.

        Raises:
            ValueError: for a pair that is longer than `tokens_per_forward`.
        """
        found: dict[int, tuple[Logps, Logps]] = {}
        pairs = [pair_tokens(row) for row in rows]
        most_rows = None if self.padded_because is None else 1
        for places in fill([pair.tokens for pair in pairs], self.tokens_per_forward, most_rows):
            together = [pairs[place] for place in places]
            with torch.no_grad(), self._autocast():
                scores = self._score_packed(together) if self.padded_because is None else self._score_padded(rows[places[0]])
            self.forwards += 1
            for place, chosen, rejected in zip(places, scores[: len(places)], scores[len(places) :], strict=True):
                found[place] = (_aligned(chosen, rows[place]["chosen_ids"]), _aligned(rejected, rows[place]["rejected_ids"]))
        return [found[place] for place in range(len(rows))]

    def _score_packed(self, pairs: list[PairTokens]) -> list[Tensor]:
        """Of the chosen completions, then of the rejected ones."""
        row = pack(pairs).to(self.model.device)
        return list(score_row(self.model, row).log_probs.float().cpu().split(row.mask.sum(dim=1).tolist()))

    def _score_padded(self, row: Mapping[str, Any]) -> list[Tensor]:
        """Of the chosen completion and the rejected one."""
        prompt = list(row["prompt_ids"])
        sequences = [torch.tensor([*prompt, *row[name]], dtype=torch.long) for name in COMPLETIONS]
        ids = pad_sequence(sequences, batch_first=True).to(self.model.device)
        attended = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True).to(ids.device)
        scored = attended.bool()
        scored[:, : len(prompt)] = False
        labels = ids.masked_fill(~scored, -100)
        outputs = self.model(input_ids=ids, attention_mask=attended, labels=labels, use_cache=False, fused_lm_head=True)
        return [logps[mask].float().cpu() for logps, mask in zip(outputs.log_probs, scored[:, 1:], strict=True)]

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.model.device.type
        return nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)


COMPLETIONS = ("chosen_ids", "rejected_ids")


def _aligned(scores: Tensor, ids: Sequence[int]) -> Logps:
    """One score per token, 0 for a first one that nothing predicts."""
    missing = torch.zeros(len(ids) - len(scores))
    return torch.cat([missing, scores]).numpy()
