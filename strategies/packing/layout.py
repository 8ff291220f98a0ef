"""Layout of pairs in one row of tokens: `prompt | chosen | rejected`, pair after pair.

The last prompt token predicts the first token of both completions, so it starts both:

    prompt[:-1] | prompt[-1] chosen[:-1] | prompt[-1] rejected[:-1]

A completion's positions continue the prompt's, and its tokens attend to the prompt and to the completion's earlier tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from strategies.models.work import triangle

__all__ = ["PackedRow", "PairTokens", "RowTokens", "Segment", "join_rows", "pack", "pair_tokens"]


class Segment(NamedTuple):
    """Numbers of tokens of one pair in a row: the shared prompt, then each completion."""

    shared: int
    chosen: int
    rejected: int

    @property
    def tokens(self) -> int:
        return self.shared + self.chosen + self.rejected

    @property
    def keys(self) -> float:
        """Sum over all tokens of the keys that each attends to: the rejected completion doesn't see the chosen one."""
        return triangle(self.shared + self.chosen) + self.rejected * self.shared + triangle(self.rejected)


@dataclass(frozen=True)
class PairTokens:
    """One pair in the layout of a row. Labels are the tokens that the last positions of their branch predict."""

    shared: list[int]
    branches: tuple[list[int], list[int]]
    labels: tuple[list[int], list[int]]
    reference: tuple[Sequence[float], Sequence[float]] | None = None
    """Log-probabilities of the labels under the reference."""

    @property
    def segment(self) -> Segment:
        return Segment(len(self.shared), len(self.branches[0]), len(self.branches[1]))

    @property
    def tokens(self) -> int:
        return self.segment.tokens

    @property
    def sequence_tokens(self) -> int:
        """Tokens of the two separate sequences, prompt and completion, as in padded batches."""
        return 2 * len(self.shared) + sum(len(branch) + 1 for branch in self.branches)


def pair_tokens(row: Mapping[str, Any], max_length: int | None = None, truncation_mode: str = "keep_start") -> PairTokens:
    """Lay out a prepared row; sequences longer than `max_length` are truncated at the end, or with `keep_end` at the start.

    Without a prompt the first token of a completion is not predicted.
    """
    prompt = list(row["prompt_ids"])
    completions: Any = (list(row["chosen_ids"]), list(row["rejected_ids"]))
    reference = (row["ref_chosen_logps"], row["ref_rejected_logps"]) if "ref_chosen_logps" in row else None
    longest = len(prompt) + max(map(len, completions))
    assert reference is None or [*map(len, reference)] == [*map(len, completions)], "one score per completion token"
    if max_length is not None and longest > max_length:
        if truncation_mode == "keep_end":
            if reference is not None:
                raise ValueError(
                    "truncation_mode: keep_end cuts beginnings off that the cached reference has seen; prepare rows of at most "
                    "sequence_len tokens, or write reference: live"
                )
            return _keep_end(prompt, completions, max_length)
        prompt = prompt[:max_length]
        completions = tuple(completion[: max_length - len(prompt)] for completion in completions)
        if reference is not None:
            reference = tuple(logps[: len(ids)] for logps, ids in zip(reference, completions, strict=True))
    if not prompt:
        if reference is not None:
            # The score of the first token too, which nothing predicts here.
            reference = tuple(logps[1:] for logps in reference)
        return PairTokens([], _each(completions, lambda ids: ids[:-1]), _each(completions, lambda ids: ids[1:]), reference)
    # An empty completion predicts nothing, so the prompt's last token isn't fed for it.
    branches = _each(completions, lambda ids: [prompt[-1], *ids[:-1]] if ids else [])
    return PairTokens(prompt[:-1], branches, completions, reference)


def _each(both: Any, change: Any) -> Any:
    return tuple(change(ids) for ids in both)


def _keep_end(prompt: list[int], completions: tuple[list[int], list[int]], max_length: int) -> PairTokens:
    """Lay out each completion with its own end of the prompt: nothing is shared, since the ends differ in length."""
    branches, labels = [], []
    for completion in completions:
        sequence = [*prompt, *completion][-max_length:]
        branches.append(sequence[:-1])
        labels.append(sequence[1:][-len(completion) :] if completion else [])
    return PairTokens([], (branches[0], branches[1]), (labels[0], labels[1]))


@dataclass(frozen=True)
class RowTokens:
    """T tokens of one row, of which N predict a completion token: what a forward needs."""

    input_ids: Tensor
    """Shape (1, T)."""
    position_ids: Tensor
    """Shape (1, T)."""
    segments: tuple[Segment, ...]
    scored_positions: Tensor
    """Shape (N,): position in the row that predicts each completion token."""
    labels: Tensor
    """Shape (N,): the predicted tokens."""


@dataclass(frozen=True)
class PackedRow(RowTokens):
    """B pairs in one row of T tokens.

    The 2B completions, the chosen ones first, have N scored tokens in total, at most L each. Tensors of shape (2B, L) hold
    them without the prompts; `mask` is 1 where there is a token.
    """

    mask: Tensor
    """Shape (2B, L)."""
    reference: Tensor | None
    """Shape (2B, L): log-probabilities under the reference."""

    def to(self, device: torch.device) -> PackedRow:
        """Return the row with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedRow:
        """Return the row with `change` applied to every tensor."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "segments"}
        changed: dict[str, Any] = {name: None if tensor is None else change(tensor) for name, tensor in tensors.items()}
        return replace(self, **changed)

    def unpack(self, values: Tensor) -> Tensor:
        """Reshape values of the scored tokens from (N,) to (2B, L), 0 where there is no token."""
        # `masked_scatter` fills row by row, the order in which `pack` concatenates the labels.
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask.bool(), values)


def pack(
    pairs: Sequence[PairTokens], pad_to_multiple_of: int | None = None, pad_token_id: int = 0, unscored: Sequence[int] = ()
) -> PackedRow:
    """Pack pairs into one row; `unscored` tokens and padding, if requested, are separate segments at the end."""
    ids: list[int] = []
    positions: list[Tensor] = []
    ends: tuple[list[int], list[int]] = ([], [])
    for pair in pairs:
        shared = len(pair.shared)
        ids += pair.shared
        positions.append(torch.arange(shared))
        for branch, end in zip(pair.branches, ends, strict=True):
            ids += branch
            positions.append(torch.arange(shared, shared + len(branch)))
            end.append(len(ids))
    segments = [pair.segment for pair in pairs]
    if unscored:
        ids += unscored
        positions.append(torch.arange(len(unscored)))
        segments.append(Segment(len(unscored), 0, 0))
    # At least one token: a pair without prompt and with completions of one token has none to feed.
    missing = -len(ids) % pad_to_multiple_of if pad_to_multiple_of else 0
    missing = missing or int(not ids)
    if missing:
        ids += [pad_token_id] * missing
        positions.append(torch.arange(missing))
        segments.append(Segment(missing, 0, 0))
    labels = [torch.tensor(pair.labels[side], dtype=torch.long) for side in (0, 1) for pair in pairs]
    # The last len(labels) positions of a branch predict its labels.
    scored = [torch.arange(end - len(ids), end) for end, ids in zip([*ends[0], *ends[1]], labels, strict=True)]
    reference = None
    if pairs[0].reference is not None:
        scores = [torch.as_tensor(pair.reference[side], dtype=torch.float32) for side in (0, 1) for pair in pairs]  # type: ignore[index]
        reference = pad_sequence(scores, batch_first=True)
    return PackedRow(
        input_ids=torch.tensor([ids]),
        position_ids=torch.cat(positions).unsqueeze(0),
        segments=tuple(segments),
        scored_positions=torch.cat(scored),
        labels=torch.cat(labels),
        mask=pad_sequence([torch.ones_like(ids) for ids in labels], batch_first=True),
        reference=reference,
    )


def join_rows(rows: Sequence[RowTokens], multiple: int = 1) -> tuple[RowTokens, list[int]]:
    """Join rows into one, in which each keeps to itself, since no pair attends to another one.

    Args:
        rows: at least one.
        multiple: of the tokens that each row takes; padding are tokens 0 in segments of their own.

    Returns:
        The row, and the tokens of its 2K parts: of each row, then of the padding after it.
    """
    sizes: list[int] = []
    padded = []
    for row in rows:
        tokens = row.input_ids.shape[1]
        missing = -tokens % multiple
        own = (Segment(missing, 0, 0),) * bool(missing)
        padded.append((pad(row.input_ids, (0, missing)), pad(row.position_ids, (0, missing)), (*row.segments, *own)))
        sizes += [tokens, missing]
    ids, positions, segments = zip(*padded, strict=True)
    starts = [0, *itertools.accumulate(sizes)][::2]
    joined = RowTokens(
        input_ids=torch.cat(ids, dim=1),
        position_ids=torch.cat(positions, dim=1),
        segments=tuple(itertools.chain(*segments)),
        scored_positions=torch.cat([row.scored_positions + start for row, start in zip(rows, starts, strict=False)]),
        labels=torch.cat([row.labels for row in rows]),
    )
    return joined, sizes
