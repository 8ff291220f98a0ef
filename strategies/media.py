"""Detection of images, audio and video, which are not supported: rows with media are refused, not trained without them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["CONVERSATIONS", "MEDIA", "OF_PARTS", "PICTURES", "USUAL", "ignored_keys", "is_given", "media_in", "refuse_media"]

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of media that belong to the text."""
PICTURES = ("image", "images")
"""Columns of a row's picture, or of its pictures in the order of their placeholders."""
USUAL = "<image>"
"""What stands for a picture in the messages of datasets that are made for several models."""
OF_PICTURES = ("detail", "fps", "max_pixels", "min_pixels", "resized_height", "resized_width", "total_pixels")
"""Keys of a picture's part by which other programs choose its pixels."""
OF_PARTS = ("image_url", "input_image", "input_audio", "video_url", "file")
"""Types of media parts in the message formats of APIs."""
CONVERSATIONS = ("prompt", "chosen", "rejected", "completion", "messages")
"""Columns of messages, whose content may be a list of parts."""


def refuse_media(row: Mapping[str, Any], name: str, supported: Sequence[str] = ()) -> Mapping[str, Any]:
    """Return the row.

    Raises:
        ValueError: if any of it is neither text nor in the `supported` columns. Where pictures are, a message may have parts of
            type image; the pictures themselves stand in the column.
    """
    if (media := _media_of(row, supported)) is not None:
        raise ValueError(
            f"{name}: {media} is no text, which alone can be trained on here; drop it if the rest stands alone, and the row "
            "if not (pictures need the processor of a vision-language model, and pairs or labelled completions)"
        )
    return row


def _media_of(row: Mapping[str, Any], supported: Sequence[str]) -> str | None:
    for name in MEDIA:
        if name in supported:
            continue
        value = row.get(name)
        if value not in (None, False) and not (hasattr(value, "__len__") and len(value) == 0):
            return f"the column {name!r}"
    for name in CONVERSATIONS:
        for kind in _kinds(row.get(name), with_placeholders="image" in supported):
            return f"a part of type {kind!r} in {name!r}"
    return None


def _kinds(turns: Any, with_placeholders: bool) -> Iterable[str]:
    """Yield the types of message parts that are not text, and the keys of media in messages and parts.

    Args:
        with_placeholders: whether parts of type image stand for pictures of the row.
    """
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, Mapping):
            continue
        yield from media_in(turn)
        content = turn.get("content")
        for part in content if isinstance(content, list) else ():
            # A part may be a bare string, too.
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            if kind not in (None, "text", "str") and not (kind == "image" and with_placeholders):
                yield kind
            elif isinstance(part, Mapping):
                yield from media_in(part)


def ignored_keys(part: Mapping[str, Any]) -> list[str]:
    """Return the keys of a picture's part that would change its pixels elsewhere; `detail: auto` leaves them to the program."""
    return [name for name in OF_PICTURES if part.get(name) not in (None, "", "auto")]


def media_in(value: Mapping[str, Any]) -> Iterable[str]:
    """Return the keys of media in a message or a part of one."""
    return [name for name in (*MEDIA, *OF_PARTS) if is_given(value.get(name))]


def is_given(value: Any) -> bool:
    """Return whether a property has a value: not None, False or an empty one."""
    # Not by comparison, which an array answers with another array.
    return not (value is None or value is False or (isinstance(value, str | bytes | list | dict) and not value))
