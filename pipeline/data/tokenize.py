"""Tokenization of rendered rows, as in TRL 1.16, with BOS and EOS once each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.data.transforms.base import Rendered
from pipeline.data.transforms.control import ESCAPE, control_tokens, end_tokens
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokenised", "opening_ids", "tokenise"]

Ids = NDArray[np.int32]
BATCH_CHARACTERS = 2_000_000
"""Characters per tokenizer call: enough to keep its threads busy; the ids, Python ints at first, must fit into memory."""


@dataclass(frozen=True)
class Tokenised:
    """Token ids of one row: the prompt, and zero to two completions; int32, shape (tokens,) each."""

    prompt: Ids
    completions: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest completion, special tokens included."""
        return len(self.prompt) + max(map(len, self.completions), default=0)


def tokenise(rows: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenised]:
    """Tokenise rows in order.

    Plain text gets the tokenizer's BOS (unless it starts with one) and an EOS after each completion, unless the completion
    ends in an end token already; white space and further end tokens after it are removed. Templated text gets
    neither. Prompt and prompt+completion are tokenised separately; the completion starts where their ids diverge.

    Raises:
        UserError: for an escaped control token (`control.escape`) that the tokenizer can't encode as text.
    """
    # BOS is prepended by hand: `add_special_tokens` would add it to templated text, and to text that starts with one, too.
    bos_ids, ends = opening_ids(tokenizer), end_tokens(tokenizer)
    for batch in _batches(rows):
        texts = [text for row in batch for text in (row.prompt, *_with_ends(row, tokenizer.eos_token, ends))]
        # verbose=False: no warning of texts beyond the model's length, which `truncation` handles.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        # One call for all texts of the batch; their ids are taken in the same order below.
        ids = iter(
            np.asarray(_ids_with_escapes(text, tokenizer) if ESCAPE in text else one, dtype=np.int32)
            for text, one in zip(texts, encoded, strict=True)
        )
        for row in batch:
            # Prompt and sequences get it alike, else their ids would diverge at the first token.
            start = bos_ids if _wants_opening(row, tokenizer.bos_token) else bos_ids[:0]
            yield _split_completions([np.concatenate([start, next(ids)]) for _ in range(1 + len(row.sequences))])


def _ids_with_escapes(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Encode a text in which some control tokens are escaped: those as plain text, the rest as usual."""
    tokens = {token[0] + ESCAPE + token[1:]: token for token in control_tokens(tokenizer)}
    longest_first = sorted(tokens, key=len, reverse=True)
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
        if piece in tokens:
            ids += _ids_as_text(tokens[piece], tokenizer)
        elif piece:
            # EOS stands for the token before: a special token is encoded by itself, so it doesn't merge with the piece.
            ids += _ids_after(tokenizer.eos_token, piece, tokenizer) if ids else _encode(piece, tokenizer)
    return ids


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"]


def _ids_after(before: str | None, text: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> list[int]:
    """Encode a text that continues `before`: at the start of a text, some tokenizers would add a space."""
    first = _encode(before or "", tokenizer, **options)
    ids = _encode((before or "") + text, tokenizer, **options)
    # Where the two merge, the ids of the continuation can't be cut out.
    return ids[len(first) :] if ids[: len(first)] == first else _encode(text, tokenizer, **options)


def _ids_as_text(token: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # A tokenizer may not support `split_special_tokens`, so the result is checked by decoding it.
    ids = _ids_after("a", token, tokenizer, split_special_tokens=True)
    control = set(tokenizer.convert_tokens_to_ids(sorted(control_tokens(tokenizer))))
    # Stripped: some tokenizers decode with a space before the first word.
    if control & set(ids) or tokenizer.decode(ids).strip() != token:
        raise UserError(
            f"encode_special_tokens: this tokenizer can't read {token!r} as text; remove the key, and {token!r} from the rows"
        )
    return ids


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Return the ids that the tokenizer puts before plain text: BOS, or none. Shape: (tokens,)."""
    # By what it does: whether BOS is added depends on class, settings and post-processor, not on `bos_token` alone.
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return np.asarray(whole[: whole.index(plain[0])] if plain else [], dtype=np.int32)


def _batches(rows: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row.prompt) + sum(map(len, row.sequences))
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _with_ends(row: Rendered, eos: str | None, ends: tuple[str, ...]) -> list[str]:
    if row.templated or not eos:
        return list(row.sequences)
    return [_with_one_end(text, eos, ends) for text in row.sequences]


def _with_one_end(text: str, eos: str, ends: tuple[str, ...]) -> str:
    """Return the text with a single end token: the first of those that it ends in, else EOS."""
    rest, end = text, None
    # An answer may hold several ends, such as its own and one that was appended; the outermost is removed first.
    while (last_end := next((token for token in ends if rest.rstrip().endswith(token)), None)) is not None:
        rest, end = rest.rstrip().removesuffix(last_end), last_end
    return text + eos if end is None else rest + end


def _wants_opening(row: Rendered, bos: str | None) -> bool:
    return not row.templated and not (bos and row.prompt.startswith(bos))


def _split_completions(ids: list[Ids]) -> Tokenised:
    prompt, *sequences = ids
    # The shorter prefix for both completions: a pair has one prompt, as in TRL's `tokenize_fn`.
    length = min((_common_length(prompt, sequence) for sequence in sequences), default=len(prompt))
    return Tokenised(prompt[:length], tuple(sequence[length:] for sequence in sequences))


def _common_length(left: Ids, right: Ids) -> int:
    shorter = min(len(left), len(right))
    different = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(different[0]) if len(different) else shorter
