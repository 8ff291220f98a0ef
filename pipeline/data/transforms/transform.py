"""A dataset type as a function of raw rows, with notes on what it doesn't read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.data.notes import UNREAD, Note
from pipeline.data.transforms.base import EMPTY, Placeholder, Rendered, Row, parsed, refuse_media
from pipeline.data.transforms.messages import MessageReader
from pipeline.data.transforms.pictures import RowPictures, take_pictures

__all__ = ["Transform"]

INDEX = ("", "Unnamed: 0", "__index_level_0__")
"""Columns in which pandas writes its index."""
CHANCE_LENGTH = 12
"""A value of more characters doesn't occur in a text by chance."""
LABEL = re.compile(r"labels?|(\w+_)?(preference|preferred|better|winner)(_\w+)?|(score|rating)_[012ab]", re.IGNORECASE)
"""Names of columns that may say which of two answers is preferred."""


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
class Transform:
    """A dataset type for one dataset, which converts raw rows to text. `render` raises `RowError` for an invalid row."""

    name: str
    render: Callable[[Row], Rendered]
    splits_pairs: bool = False
    placeholder: Placeholder | None = None
    """What stands for a picture; None where rows have none."""
    reader: MessageReader = field(default_factory=lambda: MessageReader.from_keys({}))

    def rows(self, row: Row, change: Callable[[Row], Row] = lambda row: row) -> tuple[Rendered, ...]:
        """Convert a raw row to text: one row, or the two halves of a pair. Raises RowError.

        Args:
            row: the raw row.
            change: applied to it after its pictures have been taken out.
        """
        pictures: RowPictures | None = None
        if self.placeholder is not None:
            row, pictures = take_pictures(row, self.reader, self.placeholder)
        row = change(row)
        # Columns that the type doesn't read become notes, so that no data are lost silently.
        read = ReadRow(row)
        rendered = self.render(read)
        notes = read.notes((rendered.prompt, *rendered.sequences))
        rendered = replace(rendered, notes=(*rendered.notes, *notes, *_read_as_messages(row, rendered)))
        # Last: the texts above have marks, and a column that the type drops may have had a picture.
        rendered = rendered if pictures is None else pictures.placed(rendered)
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
