"""Control tokens in the text of messages, which the tokenizer doesn't encode as text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import RowError
from pipeline.data.transforms.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ENDS",
    "ESCAPE",
    "blank_tokens",
    "control_notes",
    "control_pattern",
    "control_tokens",
    "end_tokens",
    "escape",
    "strings_of",
    "unescape",
]

ENDS = {
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"),
    *("</s>", "<eos>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "<｜end▁of▁sentence｜>"),
}
BLANK = " \t\n\r\u0120\u010a\u010d\u0109\u2581"
"""White space in the vocabularies of tokenizers: as it is, as byte-level ones write it, and sentencepiece's."""
BLANK_BYTES = ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>")
ESCAPE = "\ufdd0"
"""Inserted after the first character of a control token that is text: a noncharacter that Unicode reserves for programs."""
CONTEXT = 60
"""Characters of an example on either side of the token."""


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the tokenizer's special tokens: BOS, EOS, and turn markers."""
    # Turn markers are often added tokens only, in none of `all_special_tokens`.
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return frozenset({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the control tokens that end an answer: EOS, and end-of-turn tokens of the usual templates."""
    return tuple(token for token in control_tokens(tokenizer) if token in ENDS or token == tokenizer.eos_token)


def blank_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids of the tokens that are white space alone, ascending."""
    return tuple(
        sorted(number for token, number in tokenizer.get_vocab().items() if token in BLANK_BYTES or not str(token).strip(BLANK))
    )


def control_pattern(tokenizer: PreTrainedTokenizerBase | None) -> re.Pattern[str] | None:
    """Compile a pattern of the control tokens, longest first; returns None without any."""
    # A regular expression takes its first alternative that matches, and a token may begin another one.
    tokens = sorted(control_tokens(tokenizer), key=len, reverse=True) if tokenizer is not None else []
    return re.compile("|".join(map(re.escape, tokens))) if tokens else None


def control_notes(messages: Messages, pattern: re.Pattern[str] | None) -> list[Note]:
    """Return a note of each control token in the strings and keys of messages."""
    if pattern is None:
        return []
    texts: list[str] = []
    for value in (value for message in messages for value in message.values()):
        # Templates also print the keys of tool calls' arguments.
        texts += [value] if isinstance(value, str) else [*strings_of(value), *_keys_of(value)]
    return [
        Note("control_tokens", match.group(), text[max(match.start() - CONTEXT, 0) : match.end() + CONTEXT])
        for text in texts
        for match in pattern.finditer(text)
    ]


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string in a nested value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from strings_of(member)
    elif isinstance(value, list):
        for member in value:
            yield from strings_of(member)


def _keys_of(value: Any) -> Iterator[str]:
    """Yield every key of the objects in a nested value."""
    if isinstance(value, Mapping):
        yield from map(str, value)
    for member in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _keys_of(member)


def escape(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """Insert `ESCAPE` into each control token in the strings of a value, so that it is encoded as text.

    Raises:
        RowError: when a string contains `ESCAPE` already.
    """
    if pattern is None:
        return value
    if isinstance(value, str):
        if ESCAPE in value:
            raise RowError("the text holds U+FDD0, which is no character and stands for control tokens as text here")
        # Within the token, so that the tokenizer doesn't match it, and the template's own tokens stay as they are.
        return pattern.sub(lambda match: match[0][0] + ESCAPE + match[0][1:], value)
    if isinstance(value, Mapping):
        return {escape(name, pattern): escape(member, pattern) for name, member in value.items()}
    if isinstance(value, list):
        return [escape(member, pattern) for member in value]
    return value


def unescape(text: str) -> str:
    """Undo `escape`."""
    return text.replace(ESCAPE, "")
