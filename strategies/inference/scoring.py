"""Log-probabilities of completions under one model, packed if it supports packed rows."""

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

from strategies.batch.plan import first_fit_decreasing
from strategies.packing.layout import PairTokens, pack, pair_tokens
from strategies.packing.support import score_row, why_not_packed

__all__ = ["PairScorer"]

Logps = NDArray[np.float32]


class PairScorer:
    """Scores prepared pairs, without gradient and without materialising all logits.

    Args:
        model: in evaluation mode.
        tokens_per_forward: maximum tokens of one forward.
        autocast: dtype of the products, such as bfloat16; None uses the weights' dtype.
        longest: tokens of the longest sequence of prompt and completion; `tokens_per_forward` when None.

    Attributes:
        forwards: number of forwards so far.
        padded_because: why pairs are scored one at a time, their two sequences padded; None if they are packed.
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
            # TRL's head, which projects only the scored positions, in tiles. On the base model, whose forward PEFT calls.
            add_fused_lm_head(model.get_base_model() if isinstance(model, PeftModel) else model)

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Logps, Logps]]:
        """Return the log-probability of every completion token, float32, shapes (len(chosen_ids),) and (len(rejected_ids),).

        The first token of a completion without prompt is not predicted and gets 0.

        Raises:
            ValueError: for a pair that is longer than `tokens_per_forward`.
        """
        results: dict[int, tuple[Logps, Logps]] = {}
        pairs = [pair_tokens(row) for row in rows]
        most_rows = None if self.padded_because is None else 1
        for forward in first_fit_decreasing([pair.tokens for pair in pairs], self.tokens_per_forward, most_rows):
            with torch.no_grad(), self._autocast():
                if self.padded_because is None:
                    scores = self._score_packed([pairs[index] for index in forward])
                else:
                    scores = self._score_padded(rows[forward[0]])
            self.forwards += 1
            for index, chosen, rejected in zip(forward, scores[: len(forward)], scores[len(forward) :], strict=True):
                row = rows[index]
                results[index] = (_aligned(chosen, row["chosen_ids"]), _aligned(rejected, row["rejected_ids"]))
        return [results[index] for index in range(len(rows))]

    def _score_packed(self, pairs: list[PairTokens]) -> list[Tensor]:
        """Score the chosen completions, then the rejected ones."""
        row = pack(pairs).to(self.model.device)
        # The scores of all completions are one flat tensor; a row of the mask counts those of one.
        return list(score_row(self.model, row).log_probs.float().cpu().split(row.mask.sum(dim=1).tolist()))

    def _score_padded(self, row: Mapping[str, Any]) -> list[Tensor]:
        """Score the chosen completion and the rejected one."""
        prompt = list(row["prompt_ids"])
        sequences = [torch.tensor([*prompt, *row[name]], dtype=torch.long) for name in COMPLETIONS]
        ids = pad_sequence(sequences, batch_first=True).to(self.model.device)
        # Not `ids != 0`: the token that pads may occur in a text.
        attended = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True).to(ids.device)
        scored = attended.bool()
        scored[:, : len(prompt)] = False
        labels = ids.masked_fill(~scored, -100)
        outputs = self.model(input_ids=ids, attention_mask=attended, labels=labels, use_cache=False, fused_lm_head=True)
        # Shifted: position t of the head's output scores token t + 1.
        return [logps[mask].float().cpu() for logps, mask in zip(outputs.log_probs, scored[:, 1:], strict=True)]

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.model.device.type
        return nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)


COMPLETIONS = ("chosen_ids", "rejected_ids")


def _aligned(scores: Tensor, ids: Sequence[int]) -> Logps:
    """Return one score per token, 0 for a first token that is not predicted."""
    missing = torch.zeros(len(ids) - len(scores))
    return torch.cat([missing, scores]).numpy()
