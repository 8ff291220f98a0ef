"""Text becomes token ids, as TRL 1.16 does it, with BOS and EOS once each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline.data.transforms.base import Rendered
from pipeline.data.transforms.control import SIGN, control_tokens, end_tokens
from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokenised", "opening_ids", "tokenise"]

Ids = NDArray[np.int32]
BATCH_CHARACTERS = 2_000_000
"""Text per tokenizer call: enough to keep its threads busy, not so much that the ids, Python integers at first, fill memory."""


@dataclass(frozen=True)
class Tokenised:
    """Token ids of one row: the prompt, and its completions, none to two."""

    prompt: Ids
    completions: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt and its longest completion, special tokens included."""
        return len(self.prompt) + max(map(len, self.completions), default=0)


def tokenise(rows: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenised]:
    """Tokenise rows in order.

    Plain text gets the tokenizer's BOS (unless it starts with one) and an EOS after each completion, unless that ends in an
    end token, after which what follows is cut off; templated text gets neither. Prompt and prompt+completion are tokenised
    apart; the completion starts where they diverge.

    Raises:
        UserError: for a control token that is to be text (`control.spell`), and that the tokenizer can't read as text.
    """
    opening, ends = opening_ids(tokenizer), end_tokens(tokenizer)
    for batch in _batches(rows):
        texts = [text for row in batch for text in (row.prompt, *_closed(row, tokenizer.eos_token, ends))]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids = iter(
            np.asarray(_with_text(text, tokenizer) if SIGN in text else one, dtype=np.int32)
            for text, one in zip(texts, encoded, strict=True)
        )
        for row in batch:
            start = opening if _wants_opening(row, tokenizer.bos_token) else opening[:0]
            yield _divided([np.concatenate([start, next(ids)]) for _ in range(1 + len(row.sequences))])


def _with_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text in which some control tokens are text: their pieces', and those of what stands between."""
    tokens = {token[0] + SIGN + token[1:]: token for token in control_tokens(tokenizer)}
    longest_first = sorted(tokens, key=len, reverse=True)
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
        if piece in tokens:
            ids += _as_text(tokens[piece], tokenizer)
        elif piece:
            ids += _behind(tokenizer.eos_token, piece, tokenizer) if ids else _plain(piece, tokenizer)
    return ids


def _plain(text: str, tokenizer: PreTrainedTokenizerBase, **how: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False, **how)["input_ids"]


def _behind(before: str | None, text: str, tokenizer: PreTrainedTokenizerBase, **how: bool) -> list[int]:
    """The ids of a text that is no beginning, where some tokenizers would put a space."""
    first = _plain(before or "", tokenizer, **how)
    ids = _plain((before or "") + text, tokenizer, **how)
    return ids[len(first) :] if ids[: len(first)] == first else _plain(text, tokenizer, **how)


def _as_text(token: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = _behind("a", token, tokenizer, split_special_tokens=True)
    control = set(tokenizer.convert_tokens_to_ids(sorted(control_tokens(tokenizer))))
    if control & set(ids) or tokenizer.decode(ids).strip() != token:
        raise UserError(
            f"encode_special_tokens: this tokenizer can't read {token!r} as text; remove the key, and {token!r} from the rows"
        )
    return ids


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The ids that the tokenizer puts before plain text: BOS, or nothing. Shape: (tokens,)."""
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


def _closed(row: Rendered, eos: str | None, ends: tuple[str, ...]) -> list[str]:
    if row.templated or not eos:
        return list(row.sequences)
    return [_ended(text, eos, ends) for text in row.sequences]


def _ended(text: str, eos: str, ends: tuple[str, ...]) -> str:
    """The text with one end: the first of those that it ends in, without what follows; else EOS."""
    rest, end = text, None
    while (found := next((one for one in ends if rest.rstrip().endswith(one)), None)) is not None:
        rest, end = rest.rstrip().removesuffix(found), found
    return text + eos if end is None else rest + end


def _wants_opening(row: Rendered, bos: str | None) -> bool:
    return not row.templated and not (bos and row.prompt.startswith(bos))


def _divided(ids: list[Ids]) -> Tokenised:
    prompt, *sequences = ids
    length = min((_common_length(prompt, sequence) for sequence in sequences), default=len(prompt))
    return Tokenised(prompt[:length], tuple(sequence[length:] for sequence in sequences))


def _common_length(one: Ids, other: Ids) -> int:
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter
