"""Pictures of a row: where they stand in its text.

While a row is rendered and checked, each picture is a mark in a string (`marks.py`), so the checks of strings hold for pictures
too. `take_pictures` takes them out of the raw row, `RowPictures.placed` turns the marks into what the model's processor reads.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.data.notes import Note
from pipeline.data.transforms.base import Placeholder, Rendered, Row, RowError, parsed
from pipeline.data.transforms.control import strings_of
from pipeline.data.transforms.marks import MARK, MARK_START, mark, without_marks
from pipeline.data.transforms.messages import MessageReader
from strategies.media import PICTURES, USUAL, ignored_keys, is_given

__all__ = ["RowPictures", "as_parts", "picture_values", "take_pictures"]

PART_TYPES = ("image", "image_url", "input_image")
PAYLOADS = ("image", "image_url", "url", "path", "base64", "source")
"""Properties of a part that hold its picture."""
Parts = list[dict[str, Any]]


@dataclass(frozen=True)
class RowPictures:
    """The pictures of one row, by number; notes on their positions.

    `is_spelled`: the token of a picture stands in the row's text, which is no message.
    """

    values: tuple[Any, ...]
    placeholder: Placeholder
    is_spelled: bool = False
    notes: tuple[Note, ...] = ()

    def placed(self, rendered: Rendered) -> Rendered:
        """Return the text with placeholders instead of marks, and its pictures in their order.

        Raises:
            RowError: unless each picture stands in the prompt, and none in an answer; for a placeholder without a picture.
        """
        token, total = self.placeholder.token, len(self.values)
        is_plain = self.is_spelled and not rendered.templated
        # No column of the row says where its pictures stand, but prompt_format does.
        if is_plain and MARK_START not in rendered.prompt and rendered.prompt.count(token) == total:
            pattern = re.compile(re.escape(token))
            rendered = rendered.map_texts(lambda text: _numbered(pattern, text, 0, total))
        texts = {name: text for name, text in rendered.as_row().items() if isinstance(text, str)}
        found = [int(number) for number in MARK.findall(texts["prompt"])]
        if any(MARK_START in text for name, text in texts.items() if name != "prompt"):
            raise RowError("an answer has a picture, and only prompts can")
        if len(set(found)) != total:
            raise RowError(
                f"{len(set(found))} of the row's {total} pictures stand in its text; write {token!r} where each belongs, or "
                "give messages with parts of type image"
            )
        for name, text in texts.items():
            # It would be read as one more picture.
            if count := text.count(token):
                raise RowError(f"{name!r} holds the token of a picture, {token!r}, {count} times beside {total} pictures")
        written = None if is_plain else self.placeholder.written
        placed = rendered.map_texts(lambda text: MARK.sub(lambda _: written or token, text))
        notes = [replace(note, example=without_marks(note.example)) for note in (*placed.notes, *self.notes)]
        return replace(placed, pictures=tuple(self.values[number] for number in found), notes=tuple(notes))


def take_pictures(row: Row, reader: MessageReader, placeholder: Placeholder) -> tuple[dict[str, Any], RowPictures]:
    """Take the pictures out of a row, and put marks where they stand.

    They stand where parts of messages say so; else where the text holds a placeholder for each; else, in messages, before the
    text of the first turn of the user, as in TRL.

    Raises:
        RowError: where the number of places isn't that of the pictures.
    """
    given = _column(row)
    taken = _Taken(given, list(given))
    rest = {name: _structured(value) for name, value in row.items() if name not in PICTURES}
    marked = {name: taken.with_marks(value, name) for name, value in rest.items()}
    if not taken.values:
        # The model's own token is found where the text is placed; another model would read this one as text.
        if any(name in row for name in PICTURES) and placeholder.token != USUAL and _asks_about_pictures(rest, reader):
            raise RowError(f"the text has {USUAL!r} where a picture belongs, and the row has no pictures")
        return {name: value for name, value in row.items() if name not in PICTURES}, RowPictures((), placeholder)
    if any(MARK_START in text for text in strings_of(rest)):
        raise RowError("the text holds U+E003, which is for private use and stands for pictures here")
    is_spelled, notes = False, list[Note]()
    if given and not taken.unfilled:
        if taken.has_parts:
            raise RowError(
                f"no part of a message stands for the {len(given)} pictures of the column, and others have their own"
            )
        marked, is_spelled, notes = _by_text(marked, len(given), reader, placeholder)
    # Columns that are unchanged stay as they were, JSON text or not.
    result = {name: row[name] if value == rest[name] else value for name, value in marked.items()}
    return result, RowPictures(tuple(taken.values), placeholder, is_spelled, (*notes, *taken.notes))


def picture_values(row: Row) -> list[Any]:
    """Return the pictures of a row, wherever they belong in its text. Raises RowError."""
    taken = _Taken([], _column(row))
    for name, value in row.items():
        # Parts without a picture of their own stand for those of the column, and say nothing here.
        with suppress(RowError):
            taken.with_marks(_structured(value), name)
    return taken.values


def _column(row: Row) -> list[Any]:
    """Return the pictures of the columns `image` or `images`. Raises RowError."""
    present = {name: value for name in PICTURES if is_given(value := parsed(row.get(name)))}
    if len(present) == 2:
        raise RowError("the row has pictures in 'image' and in 'images'; give all of them in 'images'")
    for name, value in present.items():
        if name == "image" and isinstance(value, list) and len(value) != 1:
            raise RowError(f"'image' holds {len(value)} pictures; give them in 'images'")
        return value if isinstance(value, list) else [value]
    return []


@dataclass
class _Taken:
    """Pictures found so far: `given` are those of the column, and the first of `values`."""

    given: list[Any]
    values: list[Any]
    numbers: dict[Hashable, int] = field(default_factory=dict)
    has_parts: bool = False
    unfilled: bool = False
    notes: list[Note] = field(default_factory=list)

    def with_marks(self, value: Any, name: str) -> Any:
        """Return a column's messages with text instead of parts that are pictures; other values are returned unchanged."""
        messages = [value] if isinstance(value, Mapping) else value
        if not isinstance(messages, list) or not any(isinstance(message, Mapping) for message in messages):
            return value
        counter = _Counter()
        marked = [self._message(message, counter, name) for message in messages]
        # Of each column: chosen and rejected may both hold the prompt.
        if counter.next and counter.next != len(self.given):
            raise RowError(
                f"{name!r} has {counter.next} parts of type image without a picture of their own, and the row has "
                f"{len(self.given)} pictures"
            )
        return marked[0] if isinstance(value, Mapping) else marked

    def _message(self, message: Any, counter: _Counter, name: str) -> Any:
        if not isinstance(message, Mapping):
            return message
        return {
            key: [self._part(part, counter, name) for part in member] if isinstance(member, list) else member
            for key, member in message.items()
        }

    def _part(self, part: Any, counter: _Counter, name: str) -> Any:
        if not isinstance(part, Mapping) or part.get("type") not in PART_TYPES:
            return part
        payloads = [key for key in PAYLOADS if is_given(part.get(key))]
        if len(payloads) > 1:
            raise RowError(f"a part of {name!r} has a picture in {payloads[0]!r} and in {payloads[1]!r}; give one")
        self.has_parts = True
        inner = part["image_url"] if isinstance(part.get("image_url"), Mapping) else {}
        self.notes += [
            Note("picture_key", key, f"{key}: {member[key]}") for member in (part, inner) for key in ignored_keys(member)
        ]
        number = self._own(payloads[0], part[payloads[0]]) if payloads else self._of_column(part, counter, name)
        return {"type": "text", "text": mark(number)}

    def _of_column(self, part: Mapping[str, Any], counter: _Counter, name: str) -> int:
        self.unfilled = True
        index = part.get("index")
        if index is None:
            counter.next += 1
            return counter.next - 1
        if not isinstance(index, int) or not 0 <= index < len(self.given):
            raise RowError(f"a part of {name!r} is the picture {index!r} of the row, which has {len(self.given)}")
        return index

    def _own(self, key: str, value: Any) -> int:
        """Return the number of a part's own picture; equal ones, as of a prompt that both answers repeat, are one."""
        if key == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        if key == "source":
            value = _of_source(value)
        if key == "base64" and isinstance(value, str):
            value = f"data:;base64,{value}"
        identity = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else value
        hashable = identity if isinstance(identity, Hashable) else repr(identity)
        if hashable not in self.numbers:
            self.numbers[hashable] = len(self.values)
            self.values.append(value)
        return self.numbers[hashable]


def _of_source(source: Any) -> str:
    """Return the picture of a part as Anthropic's API has it, as a URL. Raises RowError."""
    kind = source.get("type") if isinstance(source, Mapping) else None
    value = source.get({"base64": "data", "url": "url"}.get(str(kind), "")) if isinstance(source, Mapping) else None
    if not isinstance(value, str) or not value:
        raise RowError(f"a picture's source must be of type base64 with data, or of type url with url, got type {kind!r}")
    return f"data:;base64,{value}" if kind == "base64" else value


@dataclass
class _Counter:
    """Number of the next picture of the column, while one column of messages is read."""

    next: int = 0


def _structured(value: Any) -> Any:
    """Parse JSON text of messages, so that its parts are found."""
    return parsed(value) if isinstance(value, str) and ('"role"' in value or '"from"' in value) else value


def _by_text(
    columns: dict[str, Any], total: int, reader: MessageReader, placeholder: Placeholder
) -> tuple[dict[str, Any], bool, list[Note]]:
    """Put marks where the text has placeholders, or before it; returns the columns, whether they are plain text, and notes."""
    conversations = {name for name, value in columns.items() if reader.is_conversation(value)}
    forms = [form for form in (placeholder.written, placeholder.token, USUAL) if form]
    # In plain text, only what the model itself reads: nothing is written around it.
    pattern = re.compile("|".join(map(re.escape, forms if conversations else [placeholder.token])))
    marked, notes = dict(columns), list[Note]()
    for name, value in columns.items():
        if isinstance(value, str) and len(pattern.findall(value)) == total:
            marked[name] = _numbered(pattern, value, 0)
        elif name in conversations and any(_is_user(message, reader) for message in value):
            marked[name], is_placed = _conversation(value, name, total, reader, pattern)
            notes += [] if is_placed else [Note("picture_placed")]
    return marked, not conversations, notes


def _asks_about_pictures(columns: Mapping[str, Any], reader: MessageReader) -> bool:
    """Return whether a turn of the user has a placeholder in its text."""
    turns = [turn for value in columns.values() if reader.is_conversation(value) for turn in value if _is_user(turn, reader)]
    contents = [turn.get(reader.properties["content"]) for turn in turns]
    return any(isinstance(content, str) and USUAL in content for content in contents)


def _is_user(message: Any, reader: MessageReader) -> bool:
    return isinstance(message, Mapping) and reader.roles.get(str(message.get(reader.properties["role"]))) == "user"


def _conversation(
    messages: list[Any], name: str, total: int, reader: MessageReader, pattern: re.Pattern[str]
) -> tuple[list[Any], bool]:
    """Put marks into the turns of a conversation; returns it, and whether its text has a place for each picture.

    Raises:
        RowError: for another number of places.
    """
    key, result, count = reader.properties["content"], list(messages), 0
    users = [index for index, message in enumerate(messages) if _is_user(message, reader)]
    for index in users:
        content = messages[index].get(key)
        if isinstance(content, str):
            result[index] = {**messages[index], key: _numbered(pattern, content, count)}
            count += len(pattern.findall(content))
    if count not in (0, total):
        raise RowError(f"{name!r} has {count} placeholders of pictures in its text, and the row has {total} pictures")
    if count:
        return result, True
    first = messages[users[0]]
    marks, content = "".join(map(mark, range(total))), first.get(key)
    parts = [{"type": "text", "text": marks}, *content] if isinstance(content, list) else f"{marks}{content or ''}"
    result[users[0]] = {**first, key: parts}
    return result, False


def _numbered(pattern: re.Pattern[str], text: str, start: int, most: int = 0) -> str:
    """Put marks in place of the first `most` placeholders; of all of them where it is 0."""
    numbers = itertools.count(start)
    return pattern.sub(lambda _: mark(next(numbers)), text, count=most)


def as_parts(content: str) -> Parts:
    """Return the content of a message as parts: text, and pictures where it has marks."""
    if not MARK.search(content):
        return [{"type": "text", "text": content}]
    # Texts and numbers take turns.
    pieces = MARK.split(content)
    texts: list[Parts] = [[{"type": "text", "text": text}] if text else [] for text in pieces[::2]]
    pictures: list[Parts] = [[{"type": "image"}] for _ in pieces[1::2]] + [[]]
    return [part for text, picture in zip(texts, pictures, strict=True) for part in (*text, *picture)]
