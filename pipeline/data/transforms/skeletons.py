"""Law 12, conservation: a rendered conversation is its messages' strings, each once and in its place, and the template's text.

A conversation of the same form (roles, and which strings there are) is rendered once with a sign in the place of each string.
What is left around the signs is the template's own text, the *skeleton*; every other conversation of the form has to be the
skeleton with its strings put in. That takes no second rendering per row. Where it doesn't hold, since a template may look at
what it renders, the strings are searched for one by one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import RowError
from pipeline.data.transforms.messages import Messages

__all__ = ["Placed", "Skeleton", "form_of", "search", "signed"]

REASONING = ("reasoning_content", "reasoning", "thinking")
TEXTS = (*REASONING, "content")
"""Properties of a message that hold what it says."""
SIGN = re.compile("\ue000(\\d+)\\.(\\d)\ue001")
THINK = re.compile(r"</?think>")
Slot = tuple[int, str]
"""Which message, and which of its properties."""


@dataclass(frozen=True)
class Placed:
    """Where the strings of a conversation stand in its text: [start, end) by slot; and what is to be noted."""

    spans: dict[Slot, tuple[int, int]]
    notes: tuple[Note, ...] = ()

    def start(self, message: int) -> int | None:
        """Where the first string of a message begins; None when it has none."""
        return min((start for (index, _), (start, _) in self.spans.items() if index == message), default=None)

    def end_before(self, message: int) -> int:
        """Where the last string of the messages before this one ends; 0 when they have none."""
        return max((end for (index, _), (_, end) in self.spans.items() if index < message), default=0)

    @property
    def end(self) -> int:
        """Where the last string ends."""
        return max((end for _, end in self.spans.values()), default=0)


@dataclass(frozen=True)
class Skeleton:
    """The template's own text: `pieces[i]` stands before the string of `slots[i]`, the last piece after all."""

    pieces: tuple[str, ...]
    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, rendered: str) -> Skeleton:
        """From a conversation that `signed` was rendered to."""
        parts = SIGN.split(rendered)
        slots = tuple((int(index), TEXTS[int(which)]) for index, which in zip(parts[1::3], parts[2::3], strict=True))
        return cls(tuple(parts[::3]), slots)

    @cached_property
    def repeated(self) -> int | None:
        """The first message of which a string comes more than once."""
        return next((index for place, (index, name) in enumerate(self.slots) if (index, name) in self.slots[:place]), None)

    def missing(self, messages: Messages) -> int | None:
        """The first message whose content the template leaves out, whatever it is."""
        return next(
            (index for index, name, _ in _strings(messages) if name == "content" and (index, name) not in self.slots), None
        )

    def place(self, messages: Messages, text: str) -> Placed | None:
        """Where the strings stand in `text`; None when it isn't this skeleton with every string of the messages once."""
        if sorted(self.slots) != sorted((index, name) for index, name, _ in _strings(messages)):
            return None
        spans, cursor = {}, 0
        for piece, slot in zip(self.pieces, self.slots, strict=False):
            if not text.startswith(piece, cursor):
                return None
            cursor += len(piece)
            string = next((one for one in _forms(messages[slot[0]][slot[1]]) if text.startswith(one, cursor)), None)
            if string is None:
                return None
            spans[slot] = (cursor, cursor := cursor + len(string))
        return Placed(spans) if text[cursor:] == self.pieces[-1] else None


def form_of(messages: Messages) -> str:
    """What conversations of one skeleton have in common."""
    return json.dumps([[_signed_value(message, name, "") for name in message] for message in messages], default=str)


def signed(messages: Messages) -> Messages:
    """The messages with a sign in the place of each string."""
    return [
        {
            name: f"\ue000{index}.{TEXTS.index(name)}\ue001" if _is_said(message, name) else value
            for name, value in message.items()
        }
        for index, message in enumerate(messages)
    ]


def search(messages: Messages, text: str, answer_from: int, earliest: int) -> Placed:
    """Where the strings stand in the text of a template that looks at them.

    Args:
        messages: the conversation.
        text: what the template made of it.
        answer_from: the first message of the answer.
        earliest: where that may begin.

    Raises:
        RowError: when one is missing, or not in its place.
    """
    spans: dict[Slot, tuple[int, int]] = {}
    notes, cursor = [], 0
    for index, name, string in _strings(messages):
        role, in_answer = messages[index]["role"], index >= answer_from
        cursor = max(cursor, earliest) if in_answer else cursor
        for part, is_reasoning in _parts(name, string):
            found = _find(text, part, cursor)
            if found is None and role in ("system", "developer"):
                found = _find(text, part, 0)
            if found is None and not is_reasoning:
                turn = f"turn {index + 1} ({role})"
                raise RowError(f"the chat template leaves out, changes or moves what {turn} says: {part[:80]!r}")
            if found is None:
                notes.append(Note("reasoning_dropped", "of the answer" if in_answer else "of earlier turns", part))
                continue
            spans[index, name] = (spans.get((index, name), found)[0], found[1])
            cursor = max(cursor, found[1])
            if is_reasoning and in_answer and name == "content" and not string.lstrip().startswith("<think>"):
                notes.append(Note("think_tags", example=string))
    return Placed(spans, tuple(notes))


def _strings(messages: Messages) -> Iterator[tuple[int, str, str]]:
    """Message, property and string of everything that is said, reasoning before content."""
    for index, message in enumerate(messages):
        for name in TEXTS:
            if _is_said(message, name):
                yield index, name, message[name]


def _is_said(message: dict[str, Any], name: str) -> bool:
    return name in TEXTS and isinstance(message.get(name), str) and bool(message[name].strip())


def _signed_value(message: dict[str, Any], name: str, sign: str) -> list[Any]:
    return [name, sign] if _is_said(message, name) else [name, message[name], None]


def _parts(name: str, string: str) -> list[tuple[str, bool]]:
    """What a template that knows of reasoning may take apart, and whether it is reasoning."""
    parts = [part.strip() for part in THINK.split(string) if part.strip()]
    return [(part, name in REASONING or (place < len(parts) - 1)) for place, part in enumerate(parts)]


def _forms(string: str) -> tuple[str, ...]:
    """How a template may write a string: as it is, without white space around it, or as JSON does."""
    escaped = json.dumps(string, ensure_ascii=False)[1:-1]
    return string, string.strip(), string.rstrip(), string.lstrip(), escaped, json.dumps(string)[1:-1]


def _find(text: str, part: str, cursor: int) -> tuple[int, int] | None:
    for form in dict.fromkeys(_forms(part)):
        if (at := text.find(form, cursor)) >= 0:
            return at, at + len(form)
    return None
