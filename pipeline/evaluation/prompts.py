"""Prompts from the user: typed, or in a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from strategies.media import PICTURES, media_in

__all__ = ["GivenPrompt", "check_prompt", "read_prompts"]

SHAPES = 'text, a list of messages, {"prompt": text or messages}, or {"messages": [...]}'
KNOWN = ("prompt", "messages", "chosen", "rejected", "completion", *PICTURES)
"""Columns that no note is made of: those that are read, and the answers of pairs."""
PICTURE = re.compile(r"data:image/.*|[^\n]*\.(avif|bmp|gif|heic|jpe?g|png|tiff?|webp)", re.IGNORECASE | re.DOTALL)
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class GivenPrompt:
    """A prompt as its user gave it."""

    content: str | list[dict[str, Any]]
    """Text, or messages."""
    location: str
    """Where it was given, for messages."""
    pictures: Mapping[str, Any] = field(default_factory=dict)
    """Columns of pictures of its row."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Other columns of its row that name or hold a picture, and what they say."""
    folder: str = "."
    """The folder to which paths of its pictures are relative."""


def read_prompts(path: str | Path) -> list[GivenPrompt]:
    """Read the prompts of a file: one per line of text or JSON lines, or a JSON list.

    Raises:
        UserError: for an unreadable or empty file, and for an invalid prompt, with its line.
    """
    file = Path(os.path.expanduser(path))
    try:
        # Without the byte order mark that editors of Windows write.
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else f"it is no text ({error})"
        raise UserError(f"--file: {str(path)!r} can't be read: {why}") from error
    folder = str(file.absolute().parent)
    prompts = [check_prompt(value, f"--file: {path}, {location}", folder) for value, location in _parse_values(text, file)]
    if not prompts:
        raise UserError(f"--file: {str(path)!r} has no prompts in it")
    return prompts


def _parse_values(text: str, file: Path) -> Iterator[tuple[Any, str]]:
    if file.suffix == ".json":
        values = _parse(text, f"--file: {file}")
        if not isinstance(values, list):
            raise UserError(f"--file: {file}: expected a list of prompts, got {type(values).__name__}")
        yield from ((value, f"entry {number}") for number, value in enumerate(values, start=1))
        return
    # Blank lines are counted, so that the number in a message is the file's.
    # Not `splitlines`: a form feed or U+2028 within a prompt ends no line.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            location = f"line {number}"
            yield _parse(line, f"--file: {file}, {location}") if file.suffix in (".jsonl", ".ndjson") else line, location


def _parse(text: str, location: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not JSON: {error}") from error


def check_prompt(value: Any, location: str, folder: str = ".") -> GivenPrompt:
    """Return the prompt in a value of any of `SHAPES`; its pictures are read where it is encoded.

    Args:
        value: what was given; a `GivenPrompt` is returned as it is.
        location: where it was given.
        folder: the folder to which paths of pictures are relative.

    Raises:
        UserError: for a value of another shape.
    """
    if isinstance(value, GivenPrompt):
        return value
    row = value if isinstance(value, dict) else {"prompt": value}
    prompt: Any = row.get("prompt", row.get("messages"))
    if media := [name for name in media_in(row) if name not in PICTURES]:
        raise UserError(f"{location}: has {media[0]!r}, and prompts are text, or text with pictures")
    unread = {name: _shown(row[name]) for name in row if name not in KNOWN and _is_picture(row[name])}
    given = GivenPrompt(prompt, location, {name: row[name] for name in PICTURES if name in row}, unread, folder)
    if isinstance(prompt, str) and prompt.strip():
        return given
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        # The generation prompt would open a second answer behind the one that is there.
        if prompt[-1]["role"] == "assistant":
            raise UserError(f"{location}: the last message is the assistant's, so there is nothing to answer; leave it out")
        return given
    raise UserError(f"{location}: expected {SHAPES}, got {_shown(value)}")


def _is_picture(value: Any) -> bool:
    """Return whether a column's value looks like a picture, or a list of some."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_picture, value))
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path") or value.get("url")
    return isinstance(value, bytes) or (isinstance(value, str) and PICTURE.fullmatch(value.strip()) is not None)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str | list)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
