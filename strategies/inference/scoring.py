"""Log-probabilities of completions under one model, packed if it supports packed rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
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
from strategies.vision.features import given_pictures, run_padded
from strategies.vision.processing import VisionProcessing

__all__ = ["HiddenStates", "PairScorer"]

Logps = NDArray[np.float32]
Hidden = NDArray[np.float16]


@dataclass(frozen=True)
class HiddenStates:
    """Mean last hidden state of each answer of a pair, over the positions that predict its tokens, shape (hidden size,)."""

    chosen: Hidden
    rejected: Hidden


class PairScorer:
    """Scores prepared pairs, without gradient and without materialising all logits.

    Args:
        model: in evaluation mode.
        tokens_per_forward: maximum tokens of one forward.
        autocast: dtype of the products, such as bfloat16; None uses the weights' dtype.
        longest: tokens of the longest sequence of prompt and completion; `tokens_per_forward` when None.
        vision: where rows have pictures, of which each is encoded once for both completions of its prompt.
        keep_hidden: keep the mean hidden state of each answer.

    Attributes:
        forwards: number of forwards so far.
        padded_because: why pairs are scored one at a time, their two sequences padded; None if they are packed.
        hidden: of the rows of the last call of `score`, in their order; empty without `keep_hidden`.
    """

    def __init__(
        self,
        model: Any,
        tokens_per_forward: int,
        autocast: torch.dtype | None = None,
        longest: int | None = None,
        vision: VisionProcessing | None = None,
        keep_hidden: bool = False,
    ) -> None:
        self.model = model
        self.keep_hidden = keep_hidden
        self.hidden: list[HiddenStates] = []
        self.tokens_per_forward = tokens_per_forward
        self.autocast = autocast
        self.vision = vision
        self.forwards = 0
        if vision is not None:
            # Before packing is prepared, whose forward is around this one: with pictures a model may need both.
            self._add_padded_head()
        self.padded_because = why_not_packed(model, longest if longest is not None else tokens_per_forward, vision)
        if self.padded_because is not None and vision is None:
            self._add_padded_head()

    def _add_padded_head(self) -> None:
        """Add TRL's head, which projects only the scored positions, in tiles; on the base model, whose forward PEFT calls."""
        add_fused_lm_head(self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model)

    def score(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Logps, Logps]]:
        """Return the log-probability of every completion token, float32, shapes (len(chosen_ids),) and (len(rejected_ids),).

        The first token of a completion without prompt is not predicted and gets 0.

        Raises:
            ValueError: for a pair that is longer than `tokens_per_forward`.
        """
        results: dict[int, tuple[Logps, Logps]] = {}
        hidden: dict[int, HiddenStates] = {}
        pairs = [pair_tokens(row) for row in rows]
        tokens = [pair.tokens for pair in pairs]
        alone = {index for index, row in enumerate(rows) if self.padded_because is not None or self._ends_in_picture(row)}
        others = [index for index in range(len(rows)) if index not in alone]
        padded = first_fit_decreasing(tokens, self.tokens_per_forward, 1, sorted(alone))
        packed = first_fit_decreasing(tokens, self.tokens_per_forward, None, others)
        for number, forward in enumerate([*padded, *packed]):
            with torch.no_grad(), self._autocast(), self._last_states() as states:
                if number < len(padded):
                    scores, predicting = self._score_padded(rows[forward[0]])
                else:
                    scores, predicting = self._score_packed(
                        [pairs[index] for index in forward], [rows[index] for index in forward]
                    )
            self.forwards += 1
            if states:
                means = _means(states[-1], predicting, [len(logps) for logps in scores])
                both = zip(means[: len(forward)], means[len(forward) :], strict=True)
                hidden |= {index: HiddenStates(*pair) for index, pair in zip(forward, both, strict=True)}
            for index, chosen, rejected in zip(forward, scores[: len(forward)], scores[len(forward) :], strict=True):
                row = rows[index]
                results[index] = (_aligned(chosen, row["chosen_ids"]), _aligned(rejected, row["rejected_ids"]))
        self.hidden = [hidden[index] for index in sorted(hidden)]
        return [results[index] for index in range(len(rows))]

    @contextmanager
    def _last_states(self) -> Iterator[list[Tensor]]:
        """Collect the last hidden states, shape (rows, T, hidden size), of the forwards within, if they are kept."""
        states: list[Tensor] = []
        if not self.keep_hidden:
            yield states
            return
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        # Of the module below the head, which both heads call: neither of them returns what it projects.
        hook = model.base_model.register_forward_hook(lambda _, __, output: states.append(output.last_hidden_state))
        try:
            yield states
        finally:
            hook.remove()

    def _ends_in_picture(self, row: Mapping[str, Any]) -> bool:
        """Return whether the prompt's last token, which a packed row has once for each completion, is of a picture."""
        return self.vision is not None and len(row["prompt_ids"]) > 0 and row["prompt_ids"][-1] == self.vision.image_token

    def _score_packed(self, pairs: list[PairTokens], rows: list[Mapping[str, Any]]) -> tuple[list[Tensor], Tensor]:
        """Score the chosen completions, then the rejected ones; return where in the row their predicting positions are, too."""
        device = self.model.device
        row, pictures = pack(pairs).to(device), given_pictures(rows, self.vision)
        outputs = score_row(self.model, row, pictures=pictures.to(device).pixels if pictures is not None else None)
        # The scores of all completions are one flat tensor; a row of the mask counts those of one.
        return list(outputs.log_probs.float().cpu().split(row.mask.sum(dim=1).tolist())), row.scored_positions

    def _score_padded(self, row: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
        """Score the chosen completion and the rejected one; return where in the batch their predicting positions are, too."""
        prompt = list(row["prompt_ids"])
        sequences = [torch.tensor([*prompt, *row[name]], dtype=torch.long) for name in COMPLETIONS]
        ids = pad_sequence(sequences, batch_first=True).to(self.model.device)
        # Not `ids != 0`: the token that pads may occur in a text.
        attended = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True).to(ids.device)
        scored = attended.bool()
        scored[:, : len(prompt)] = False
        inputs = {"input_ids": ids, "attention_mask": attended, "labels": ids.masked_fill(~scored, -100)}
        pictures = given_pictures([row], self.vision)
        outputs = run_padded(self.model, inputs, pictures.to(ids.device) if pictures is not None else None, len(COMPLETIONS))
        # Shifted: position t of the head's output scores token t + 1.
        predicting = scored.roll(-1, dims=1)
        predicting[:, -1] = False
        logps = [values[mask].float().cpu() for values, mask in zip(outputs.log_probs, scored[:, 1:], strict=True)]
        return logps, predicting.flatten().nonzero().squeeze(1)

    def _autocast(self) -> AbstractContextManager[Any]:
        device = self.model.device.type
        return nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)


COMPLETIONS = ("chosen_ids", "rejected_ids")


def _means(states: Tensor, predicting: Tensor, lengths: list[int]) -> list[Hidden]:
    """Return the mean state of each completion, 0 for one of which nothing is predicted.

    Args:
        states: shape (rows, T, hidden size).
        predicting: positions in the flattened rows that predict the completions' tokens, completion after completion.
        lengths: predicted tokens of each completion.
    """
    parts = states.flatten(0, 1)[predicting].float().split(lengths)
    return [(part.sum(dim=0) / max(1, len(part))).half().cpu().numpy() for part in parts]


def _aligned(scores: Tensor, ids: Sequence[int]) -> Logps:
    """Return one score per token, 0 for a first token that is not predicted."""
    missing = torch.zeros(len(ids) - len(scores))
    return torch.cat([missing, scores]).numpy()
