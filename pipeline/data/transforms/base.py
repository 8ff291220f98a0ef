"""Base of the dataset types: their context, result and errors, and readers of a row's fields."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from pipeline.data.notes import Note
from pipeline.data.strict_json import strict_json
from strategies.media import MEDIA, PICTURES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Context",
    "Placeholder",
    "Rendered",
    "Row",
    "RowError",
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


def refuse_media(row: Row) -> None:
    """Raise RowError for a row with images, audio or video."""
    if media := [name for name in MEDIA if row.get(name) not in EMPTY]:
        hint = (
            " (pairs and labelled completions may have pictures, with a vision-language model)" if media[0] in PICTURES else ""
        )
        raise RowError(
            f"the column {media[0]!r} is no text, which alone can be trained on; drop it if the rest stands alone{hint}"
        )


@dataclass(frozen=True)
class Placeholder:
    """What stands for a picture in a text.

    `token` is what the processor expands. `written` is what the chat template writes for a picture, with the token in it; None
    where it takes no pictures. `takes_parts`: the template takes content as a list of parts.
    """

    token: str
    written: str | None = None
    takes_parts: bool = False


@dataclass(frozen=True)
class Context:
    """Arguments of a dataset type's factory.

    `template` is the Jinja source of the dataset's own chat template, None for the tokenizer's. `keys` are the keys of
    the dataset as given in the config, including `path` etc. `day` is the date that chat templates print as today's, None for
    that of the clock. `placeholder` is what stands for a picture, None for a model that takes none.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    template: str | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)
    day: date | None = None
    placeholder: Placeholder | None = None


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
    pictures: tuple[Any, ...] = ()
    """The pictures whose placeholders stand in the prompt, in order, as the row gives them."""

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
