"""Law 12, conservation: a rendered conversation is its messages' strings, each once and in order, and the template's text.

For each form of conversation (roles, and properties with text) the template is rendered once with a placeholder for each
string. The text around the placeholders is the template's own, the *skeleton*; every other conversation of the form must be the
skeleton with its strings filled in, which takes no second rendering per row. Where it isn't, since a template may inspect its
input, the strings are searched for one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import RowError
from pipeline.data.transforms.marks import MARK
from pipeline.data.transforms.messages import REASONING, Messages

__all__ = ["TEXTS", "Alignment", "Skeleton", "search", "skeleton_key", "with_placeholders", "written_forms"]

TEXTS = (*REASONING, "content")
"""Properties of a message that hold its text."""
PLACEHOLDER = re.compile("\ue000(\\d+)\\.(\\d)\ue001")
THINK = re.compile(r"</?think>")
WITH_MARKS = re.compile(f"({MARK.pattern.replace('(', '(?:')})")
"""A picture, as a separator that `split` keeps."""
CHANCE_LENGTH = 12
"""A string of this length doesn't occur in a text by chance."""
Slot = tuple[int, str]
"""Index of a message, and name of its property."""


@dataclass(frozen=True)
class Alignment:
    """Positions of a conversation's strings in its rendered text: [start, end) by slot; and notes."""

    spans: dict[Slot, tuple[int, int]]
    notes: tuple[Note, ...] = ()

    def start(self, message: int) -> int | None:
        """Return the start of a message's first string; None when it has none."""
        return min((start for (index, _), (start, _) in self.spans.items() if index == message), default=None)

    def end_before(self, message: int) -> int:
        """Return the end of the last string of the messages before this one; 0 when they have none."""
        return max((end for (index, _), (_, end) in self.spans.items() if index < message), default=0)

    @cached_property
    def end(self) -> int:
        """End of the last string."""
        return max((end for _, end in self.spans.values()), default=0)


@dataclass(frozen=True)
class Skeleton:
    """The template's own text: `pieces[i]` precedes the string of `slots[i]`, the last piece follows all."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]
    missing: int | None
    """The first message whose content the template always leaves out."""
    is_whole: bool
    """Whether each string of the conversation has exactly one slot."""

    @classmethod
    def of(cls, messages: Messages, rendered: str) -> Skeleton:
        """Build the skeleton of a conversation from the rendered text of its placeholders (`with_placeholders`)."""
        parts = PLACEHOLDER.split(rendered)
        slots = tuple((int(index), TEXTS[int(which)]) for index, which in zip(parts[1::3], parts[2::3], strict=True))
        strings = [(index, name) for index, name, _ in _strings(messages)]
        # Content only: templates may leave out the reasoning of earlier turns.
        missing = next((index for index, name in strings if name == "content" and (index, name) not in slots), None)
        # Sorted: a template may write reasoning and content, or a system turn, in an order of its own.
        return cls(tuple(parts[::3]), slots, missing, sorted(slots) == sorted(strings))

    @cached_property
    def repeated(self) -> int | None:
        """The first message with a string that is rendered more than once."""
        return next(
            (index for position, (index, name) in enumerate(self.slots) if (index, name) in self.slots[:position]), None
        )

    @cached_property
    def moved(self) -> int | None:
        """The first message, of any role, that is rendered after a later one."""
        order = [index for index, _ in self.slots]
        return next((index for position, index in enumerate(order) if any(later > index for later in order[:position])), None)

    def align(self, messages: Messages, text: str) -> Alignment | None:
        """Find the strings of the messages in `text`; returns None unless `text` is this skeleton with each string once."""
        if not self.is_whole:
            return None
        # `slots` is one shorter than `pieces`: each piece is followed by one string, except the last.
        spans, cursor = {}, 0
        for piece, slot in zip(self.pieces, self.slots, strict=False):
            if not text.startswith(piece, cursor):
                return None
            cursor += len(piece)
            string = next((form for form in written_forms(messages[slot[0]][slot[1]]) if text.startswith(form, cursor)), None)
            if string is None:
                return None
            # Left to right: the first element is the old cursor.
            spans[slot] = (cursor, cursor := cursor + len(string))
        return Alignment(spans) if text[cursor:] == self.pieces[-1] else None


def skeleton_key(messages: Messages, kwargs: Mapping[str, Any]) -> Hashable:
    """Return the key of a conversation's skeleton: its messages without their texts, and the template's other arguments."""
    turns = tuple(
        tuple((name, ... if _has_text(message, name) else _hashable(value)) for name, value in message.items())
        for message in messages
    )
    return turns, tuple((name, _hashable(value)) for name, value in kwargs.items())


def with_placeholders(messages: Messages) -> Messages:
    """Return the messages with a placeholder instead of each string."""
    return [
        {
            name: f"\ue000{index}.{TEXTS.index(name)}\ue001" if _has_text(message, name) else value
            for name, value in message.items()
        }
        for index, message in enumerate(messages)
    ]


def search(messages: Messages, text: str, answer_from: int, earliest: int) -> Alignment:
    """Find the strings one by one in the text of a template that inspects them.

    Args:
        messages: the conversation.
        text: its rendered text.
        answer_from: index of the answer's first message.
        earliest: lowest position of the answer's first string.

    Raises:
        RowError: when a string is missing, or out of order.
    """
    spans: dict[Slot, tuple[int, int]] = {}
    notes, cursor = [], 0
    for index, name, string in _strings(messages):
        role, in_answer = messages[index]["role"], index >= answer_from
        # The answer's text may occur in the prompt as well; it is searched for behind the text that both share.
        cursor = max(cursor, earliest) if in_answer else cursor
        for part, is_reasoning in _parts(name, string):
            # Templates may move a system turn, and may leave out reasoning; all other strings must follow in order.
            span = _find(text, part, cursor)
            if span is None and role in ("system", "developer"):
                span = _find(text, part, 0)
            if span is None and MARK.fullmatch(part) and part in text:
                # Some templates put the pictures of a turn before its text.
                notes.append(Note("picture_moved", example=string))
                continue
            if span is None and not is_reasoning:
                turn = f"turn {index + 1} ({role})"
                raise RowError(f"the chat template leaves out, changes or moves what {turn} says: {part[:80]!r}")
            if span is None:
                notes.append(Note("reasoning_dropped", "of the answer" if in_answer else "of earlier turns", part))
                continue
            # From the first part to the last one: think tags divide a string into several.
            spans[index, name] = (spans.get((index, name), span)[0], span[1])
            # A moved system turn is found before the cursor, which must not go back.
            cursor = max(cursor, span[1])
            if is_reasoning and in_answer and name == "content" and not string.lstrip().startswith("<think>"):
                notes.append(Note("think_tags", example=string))
    return Alignment(spans, (*notes, *_repeats(messages, text)))


def _repeats(messages: Messages, text: str) -> Iterator[Note]:
    """Yield a note of each longer string that occurs more often in the text than in the messages."""
    strings = [string.strip() for _, _, string in _strings(messages)]
    for string in dict.fromkeys(strings):
        # Counted within the other strings too: an answer may quote the question.
        if len(string) >= CHANCE_LENGTH and text.count(string) > sum(other.count(string) for other in strings):
            yield Note("repeated", example=string)


def _strings(messages: Messages) -> Iterator[tuple[int, str, str]]:
    """Yield (message index, property, string) of all non-empty texts, reasoning before content."""
    for index, message in enumerate(messages):
        for name in TEXTS:
            if _has_text(message, name):
                yield index, name, message[name]


def _has_text(message: dict[str, Any], name: str) -> bool:
    return name in TEXTS and isinstance(message.get(name), str) and bool(message[name].strip())


def _hashable(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=str)


def _parts(name: str, string: str) -> list[tuple[str, bool]]:
    """Split a string at think tags and pictures, which a template may render apart; returns (part, whether it is reasoning)."""
    parts = [part.strip() for part in THINK.split(string) if part.strip()]
    flags = [(part, name in REASONING or (index < len(parts) - 1)) for index, part in enumerate(parts)]
    return [(piece.strip(), is_reasoning) for part, is_reasoning in flags for piece in WITH_MARKS.split(part) if piece.strip()]


def written_forms(string: str) -> Iterator[str]:
    """Yield the forms in which a template may write a string: verbatim, stripped of white space, or escaped as in JSON."""
    yield string
    yield from (string.strip(), string.rstrip(), string.lstrip())
    yield from (json.dumps(string, ensure_ascii=False)[1:-1], json.dumps(string)[1:-1])


def _find(text: str, part: str, cursor: int) -> tuple[int, int] | None:
    for form in dict.fromkeys(written_forms(part)):
        if (at := text.find(form, cursor)) >= 0:
            return at, at + len(form)
    return None
