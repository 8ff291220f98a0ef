"""Control tokens in the text of messages, which the tokenizer doesn't read as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import Note
from pipeline.data.transforms.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SIGN", "control_notes", "control_pattern", "control_tokens", "end_tokens", "spell", "spelled", "strings_of"]

ENDS = {
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<eos>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<｜end▁of▁sentence｜>"),
}
SIGN = "\ufdd0"
"""Behind the first character of a control token that is to be text. No character: Unicode keeps it for programs."""
AROUND = 60
"""Characters of an example on either side of the token."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The tokenizer's special tokens: beginnings, ends, and headers of turns."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return frozenset({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Those of them that end an answer: the tokenizer's EOS, and the ends of turns of the usual templates."""
    return tuple(token for token in control_tokens(tokenizer) if token in ENDS or token == tokenizer.eos_token)


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
        for text in strings_of(messages)
        for found in pattern.finditer(text)
    ]


def strings_of(value: Any) -> Iterator[str]:
    """Every string that a value holds, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from strings_of(member)
    elif isinstance(value, list):
        for member in value:
            yield from strings_of(member)


def spell(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """A row's value with a sign in each control token that its strings hold, so that nobody takes it for one."""
    if pattern is None:
        return value
    if isinstance(value, str):
        return pattern.sub(lambda found: found[0][0] + SIGN + found[0][1:], value)
    if isinstance(value, Mapping):
        return {name: spell(member, pattern) for name, member in value.items()}
    if isinstance(value, list):
        return [spell(member, pattern) for member in value]
    return value


def spelled(text: str) -> str:
    """The text as it was given."""
    return text.replace(SIGN, "")
