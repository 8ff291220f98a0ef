"""Base of the dataset types: their context, result and errors, and readers of a row's fields."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import UNREAD, Note
from pipeline.data.strict_json import strict_json
from strategies.media import MEDIA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Context",
    "Rendered",
    "Row",
    "RowError",
    "Transform",
    "completion_text",
    "label_field",
    "list_field",
    "optional_text",
    "pair_text",
    "refuse_media",
    "require_text",
    "required",
    "text_field",
]

Row = Mapping[str, Any]


class RowError(ValueError):
    """An invalid row; the message is the reason recorded in `rejected/`."""


EMPTY: tuple[Any, ...] = (None, "", [], {})
INDEX = ("", "Unnamed: 0", "__index_level_0__")
"""Columns in which pandas writes its index."""
CHANCE_LENGTH = 12
"""A value of more characters doesn't occur in a text by chance."""
LABEL = re.compile(r"labels?|(\w+_)?(preference|preferred|better|winner)(_\w+)?|(score|rating)_[012ab]", re.IGNORECASE)
"""Names of columns that may say which of two answers is preferred."""


def refuse_media(row: Row) -> None:
    """Raise RowError for a row with images, audio or video."""
    if media := [name for name in MEDIA if row.get(name) not in EMPTY]:
        raise RowError(f"the column {media[0]!r} is no text, which alone can be trained on; drop it if the rest stands alone")


def _is_in(value: Any, texts: tuple[str, ...]) -> bool:
    return isinstance(value, str) and len(value) > CHANCE_LENGTH and any(value.strip() in text for text in texts)


class ReadRow(Mapping[str, Any]):
    """A row that records which of its columns were read."""

    def __init__(self, row: Row) -> None:
        self._row, self._read = row, set[str]()

    # `Mapping` implements `get` and `in` by this method, so they count as reading too.
    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def notes(self, texts: tuple[str, ...]) -> list[Note]:
        """Return a note of each non-empty column that wasn't read and whose value occurs in none of the texts.

        Raises:
            RowError: for images, audio and video.
        """
        unread = [name for name, value in self._row.items() if name not in self._read and value not in EMPTY]
        # A column that repeats what another one gave, such as the question beside the messages, loses nothing.
        unread = [name for name in unread if name not in INDEX and not _is_in(self._row[name], texts)]
        # An error, not a note: text that refers to a picture can't be trained on without it.
        refuse_media({name: self._row[name] for name in unread})
        kinds = {name: UNREAD if LABEL.fullmatch(name) is None else "may_be_the_label" for name in unread}
        return [Note(kind, name, str(self._row[name])) for name, kind in kinds.items()]


@dataclass(frozen=True)
class Context:
    """Arguments of a dataset type's factory.

    `template` is the Jinja source of the dataset's own chat template, None for the tokenizer's. `keys` are the keys of
    the dataset as given in the config, including `path` etc. `day` is the date that chat templates print as today's, None for
    that of the clock.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    template: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None


@dataclass(frozen=True)
class Rendered:
    """One row as text.

    `prompt` is the model's input before it answers. `sequences` are prompt and completion together: (chosen, rejected),
    (completion,), or () for a prompt alone, for which the trainer receives `reward_columns` (the prompt among them).
    `templated` text comes from a chat template and contains its special tokens; other text still needs the tokenizer's BOS and
    EOS. A chat template may render the prompt differently when no answer follows (a generation prompt that opens `<think>`),
    so `prompt` need not be a prefix of the sequences.
    """

    prompt: str
    sequences: tuple[str, ...]
    templated: bool
    label: bool | None = None
    reward_columns: Mapping[str, Any] | None = None
    notes: tuple[Note, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """Return `{prompt, chosen, rejected}`, `{prompt, completion, label}` or `{prompt, row}`.

        A completion starts where the texts diverge.
        """
        if self.reward_columns is not None:
            return {"prompt": self.prompt, "row": self.reward_columns}
        prompt = self.prompt
        if not all(sequence.startswith(prompt) for sequence in self.sequences):
            prompt = os.path.commonprefix([prompt, *self.sequences])  # noqa: RUF071 - by character is what we want
        texts = [sequence[len(prompt) :] for sequence in self.sequences]
        if self.label is None:
            return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}
        return {"prompt": prompt, "completion": texts[0], "label": self.label}

    def map_texts(self, change: Callable[[str], str]) -> Rendered:
        """Apply a function to prompt and sequences; `reward_columns` stay unchanged."""
        return replace(self, prompt=change(self.prompt), sequences=tuple(map(change, self.sequences)))

    def halves(self) -> tuple[Rendered, Rendered]:
        """Split a pair into two labelled completions, chosen first, each with the whole prompt, as TRL does."""
        chosen, rejected = self.sequences
        return replace(self, sequences=(chosen,), label=True), replace(self, sequences=(rejected,), label=False)


@dataclass(frozen=True)
class Transform:
    """A dataset type for one dataset, which converts raw rows to text. `render` raises `RowError` for an invalid row."""

    name: str
    render: Callable[[Row], Rendered]
    splits_pairs: bool = False

    def rows(self, row: Row) -> tuple[Rendered, ...]:
        """Convert a raw row to text: one row, or the two halves of a pair. Raises RowError."""
        # Columns that the type doesn't read become notes, so that no data are lost silently.
        read = ReadRow(row)
        rendered = self.render(read)
        notes = read.notes((rendered.prompt, *rendered.sequences))
        rendered = replace(rendered, notes=(*rendered.notes, *notes, *_read_as_messages(row, rendered)))
        return rendered.halves() if self.splits_pairs else (rendered,)

    def __call__(self, row: Row) -> dict[str, Any]:
        return self.render(row).as_row()


def _read_as_messages(row: Row, rendered: Rendered) -> Iterator[Note]:
    """Yield a note of each column that was parsed as a single JSON message, though it may have been the answer itself."""
    for name, value in row.items():
        # A cheap test first: most columns are plain text, and parsing each would be slow.
        if not isinstance(value, str) or value.lstrip()[:1] != "{" or ('"role"' not in value and '"from"' not in value):
            continue
        is_message = isinstance(message := parsed(value), Mapping) and message.keys() & {"role", "from"}
        if is_message and not any(value.strip() in text for text in (rendered.prompt, *rendered.sequences)):
            yield Note("read_as_message", name, value)


def pair_text(prompt: str, chosen: str, rejected: str) -> Rendered:
    """Build a pair of plain text. Raises RowError for equal answers."""
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    # Concatenated as text and tokenised together, as TRL does: tokens may merge across the boundary.
    return Rendered(prompt, (prompt + chosen, prompt + rejected), templated=False)


def completion_text(prompt: str, completion: str, label: bool) -> Rendered:
    """Build a labelled completion of plain text."""
    return Rendered(prompt, (prompt + completion,), templated=False, label=label)


def required(row: Row, name: str) -> Any:
    """Return the value of a required column. Raises RowError when it is missing or null."""
    if row.get(name) is None:
        raise RowError(f"no column {name!r} (the row has {', '.join(row) or 'none'})")
    return row[name]


def text_field(row: Row, *names: str) -> str:
    """Return the text of the first of the columns `names` that the row has. Raises RowError when missing, empty or no text."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise RowError(f"no column {' or '.join(map(repr, names))} (the row has {', '.join(row) or 'none'})")
    return require_text(row[name], name)


def require_text(value: Any, name: str) -> str:
    """Return `value` if it is text with more than white space. Raises RowError."""
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{name!r} is empty")
    return value


def optional_text(row: Row, name: str) -> str:
    """Return the text of a column, "" when it is missing, null or empty. Raises RowError for other values."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be text, got {type(value).__name__}")
    return value


def list_field(row: Row, name: str) -> list[Any]:
    """Return a non-empty list; JSON text (from a CSV cell) is parsed. Raises RowError."""
    value = parsed(required(row, name))
    if not isinstance(value, list):
        raise RowError(f"{name!r} must be a list, got {type(value).__name__}")
    if not value:
        raise RowError(f"{name!r} is empty")
    return value


def parsed(value: Any) -> Any:
    """Parse a value that is the JSON text of a list or an object; other values are returned unchanged."""
    # Not any JSON: a cell that holds `1`, `true` or `"text"` is text.
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return strict_json(value)
        except (ValueError, RecursionError):  # RecursionError: brackets nested a thousand deep, as models generate them
            return value
    return value


def label_field(row: Row, name: str = "label") -> bool:
    """Read a label: true, false, 1, 0, "true" or "false". Raises RowError for other values."""
    value = row.get(name)
    if isinstance(value, bool):
        return value
    # Floats too: pandas writes integers with missing values so.
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    text = str(value).strip().lower()
    if text in ("true", "false"):
        return text == "true"
    if text in ("1", "0", "1.0", "0.0"):
        return float(text) == 1
    if value is None:
        raise RowError(f"{name!r} is null" if name in row else f"no column {name!r} (the row has {', '.join(row) or 'none'})")
    raise RowError(f"{name!r} must be true, false, 1 or 0, got {value!r}")
