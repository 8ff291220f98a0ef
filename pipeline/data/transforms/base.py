"""What every dataset type shares: its result, its errors, and how it reads the fields of a row."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import UNREAD, Note

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
    """A row that cannot be used; the message is the reason that stands in `rejected/`."""


MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of what isn't text, and belongs to what the text says."""


EMPTY: tuple[Any, ...] = (None, "", [], {})


def refuse_media(row: Row) -> None:
    """Raises RowError for a row with pictures, sound or films."""
    if media := [name for name in MEDIA if row.get(name) not in EMPTY]:
        raise RowError(f"the column {media[0]!r} is no text, which alone can be trained on; drop it if the rest stands alone")


class ReadRow(Mapping[str, Any]):
    """A row that knows which of its columns were read."""

    def __init__(self, row: Row) -> None:
        self._row, self._read = row, set[str]()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def notes(self) -> list[Note]:
        """One of each column that holds something and wasn't read. Raises RowError for pictures, sound and films."""
        unread = [name for name, value in self._row.items() if name not in self._read and value not in EMPTY]
        refuse_media({name: self._row[name] for name in unread})
        return [Note(UNREAD, name, str(self._row[name])) for name in unread]


@dataclass(frozen=True)
class Context:
    """What a dataset type is built from.

    `template` is the Jinja source of the dataset's own chat template, None for the tokenizer's. `keys` are the keys of
    the dataset as given in the config, `path` and such included.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    template: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """One row as text.

    `prompt` is what the model is given before it answers. `sequences` are prompt and completion together: (chosen,
    rejected), (completion,), or () for a prompt alone, of which `handed` is what the trainer gets. `templated` text comes
    from a chat template and carries its own special tokens; other text still needs the tokenizer's BOS and EOS. A chat
    template may render the prompt otherwise when no answer follows (a generation prompt that opens `<think>`), so `prompt`
    need not be a prefix of the sequences.
    """

    prompt: str
    sequences: tuple[str, ...]
    templated: bool
    label: bool | None = None
    handed: Mapping[str, Any] | None = None
    notes: tuple[Note, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """`{prompt, chosen, rejected}`, `{prompt, completion, label}` or `{prompt, row}`.

        A completion starts where texts diverge.
        """
        if self.handed is not None:
            return {"prompt": self.prompt, "row": self.handed}
        prompt = os.path.commonprefix([self.prompt, *self.sequences])  # noqa: RUF071 - by character is what we want
        texts = [sequence[len(prompt) :] for sequence in self.sequences]
        if self.label is None:
            return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}
        return {"prompt": prompt, "completion": texts[0], "label": self.label}

    def changed(self, change: Callable[[str], str]) -> Rendered:
        """The row with its texts changed; what is handed on stays."""
        return replace(self, prompt=change(self.prompt), sequences=tuple(map(change, self.sequences)))

    def halves(self) -> tuple[Rendered, Rendered]:
        """A pair as two labelled answers, chosen first: each with the whole prompt, as TRL unpairs."""
        chosen, rejected = self.sequences
        return replace(self, sequences=(chosen,), label=True), replace(self, sequences=(rejected,), label=False)


@dataclass(frozen=True)
class Transform:
    """A dataset type, ready to turn raw rows into text. `render` raises `RowError` for a row that cannot be used."""

    name: str
    render: Callable[[Row], Rendered]
    splits_pairs: bool = False

    def rows(self, row: Row) -> tuple[Rendered, ...]:
        """The prepared rows that a raw row becomes: one, or the two halves of a pair. Raises RowError."""
        read = ReadRow(row)
        rendered = self.render(read)
        rendered = replace(rendered, notes=(*rendered.notes, *read.notes()))
        return rendered.halves() if self.splits_pairs else (rendered,)

    def __call__(self, row: Row) -> dict[str, Any]:
        return self.render(row).as_row()


def pair_text(prompt: str, chosen: str, rejected: str) -> Rendered:
    """A pair of plain text."""
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    return Rendered(prompt, (prompt + chosen, prompt + rejected), templated=False)


def completion_text(prompt: str, completion: str, label: bool) -> Rendered:
    """A labelled completion of plain text."""
    return Rendered(prompt, (prompt + completion,), templated=False, label=label)


def required(row: Row, name: str) -> Any:
    """The value of a column that has to be there. Raises RowError where it isn't, or is null."""
    if row.get(name) is None:
        raise RowError(f"no column {name!r} (the row has {', '.join(row) or 'none'})")
    return row[name]


def text_field(row: Row, *names: str) -> str:
    """The first of `names` that the row has, as text that is not empty."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise RowError(f"no column {' or '.join(map(repr, names))} (the row has {', '.join(row) or 'none'})")
    return require_text(row[name], name)


def require_text(value: Any, name: str) -> str:
    """`value` when it is text that says something."""
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise RowError(f"{name!r} is empty")
    return value


def optional_text(row: Row, name: str) -> str:
    """The text of a column that may be missing, null or empty: then ""."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be text, got {type(value).__name__}")
    return value


def list_field(row: Row, name: str) -> list[Any]:
    """A list that is not empty; JSON text (as a CSV cell holds it) is parsed."""
    value = parsed(required(row, name))
    if not isinstance(value, list):
        raise RowError(f"{name!r} must be a list, got {type(value).__name__}")
    if not value:
        raise RowError(f"{name!r} is empty")
    return value


def parsed(value: Any) -> Any:
    """`value`, or what it holds when it is the JSON text of a list or an object."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):  # also for brackets a thousand deep, as models write them
            return value
    return value


def label_field(row: Row, name: str = "label") -> bool:
    """A label: true, false, 1, 0, "true" or "false"."""
    value = row.get(name)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    text = str(value).strip().lower()
    if text in ("true", "false"):
        return text == "true"
    if text in ("1", "0", "1.0", "0.0"):
        return float(text) == 1
    if value is None:
        raise RowError(f"no column {name!r} (the row has {', '.join(row) or 'none'})")
    raise RowError(f"{name!r} must be true, false, 1 or 0, got {value!r}")
