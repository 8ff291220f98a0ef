"""Control tokens in the text of messages, which the tokenizer doesn't read as text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.data.notes import Note
from pipeline.data.transforms.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["control_notes", "control_pattern", "control_tokens"]

AROUND = 60
"""Characters of an example on either side of the token."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The tokenizer's special tokens: beginnings, ends, and headers of turns."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return frozenset({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def control_pattern(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str] | None:
    """Finds control tokens in a text; None where there are none."""
    tokens = sorted(control_tokens(tokenizer), key=len, reverse=True) if tokenizer is not None else []
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def control_notes(messages: Messages, pattern: re.Pattern[str] | None) -> list[Note]:
    """A note of each control token that a message's text holds."""
    if pattern is None:
        return []
    return [
        Note("control_tokens", found.group(), text[max(found.start() - AROUND, 0) : found.end() + AROUND])
        for text in (message["content"] for message in messages)
        for found in pattern.finditer(text)
    ]
