"""The pictures of a row: reading them, and keeping them without loss."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["decode_picture", "encode_pictures", "picture_format", "picture_key", "pictures_of"]

DEEP = ("I", "F")
"""Beginnings of Pillow's modes of more than 8 bits a channel."""
BROKEN = (OSError, SyntaxError, EOFError, IndexError, TypeError, RuntimeError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for a broken file, by format, and for one that would take too much memory."""


def pictures_of(row: Mapping[str, Any]) -> list[Image.Image]:
    """Return a row's pictures, in the order of their placeholders.

    Raises:
        ValueError: for what is no picture, or not one that can be shown in 8 bits a channel.
    """
    image, images = row.get("image"), row.get("images")
    if images is not None and not isinstance(images, list | tuple):
        raise ValueError(f"images: expected a list of pictures, got {type(images).__name__}; one picture is given in image")
    if image is not None and images:
        raise ValueError("the row has pictures in image and in images; give all of them in images")
    return [decode_picture(value) for value in ([image] if image is not None else images or ())]


def decode_picture(value: Any) -> Image.Image:
    """Return an RGB picture, upright, of a picture, encoded bytes, a path, or a mapping of `bytes` and `path`.

    Raises:
        ValueError: for what is no picture, is broken or too large, moves, or has more than 8 bits a channel.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    try:
        return _upright(_open(value) if isinstance(value, bytes | str) else value)
    except ValueError as error:
        raise ValueError(f"{error} ({value})" if isinstance(value, str) else str(error)) from error
    except (*BROKEN, Image.DecompressionBombWarning) as error:
        where = f" ({value})" if isinstance(value, str) and value not in str(error) else ""
        raise ValueError(f"a picture can't be read: {error}{where}") from error


def picture_format(data: bytes) -> str:
    """Return the name of the format of an encoded picture, such as `png`. Raises ValueError as `decode_picture`."""
    try:
        return (_open(data).format or "").lower()
    except (*BROKEN, Image.DecompressionBombWarning) as error:
        raise ValueError(f"a picture can't be read: {error}") from error


def _open(value: bytes | str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow only warns of a picture between its limit and twice as many pixels.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    # Its own message has the address of the bytes, another one each time.
    except UnidentifiedImageError as error:
        raise ValueError("a picture can't be read: it is of no format that Pillow knows") from error
    if image.format == "EPS":  # a program, which Ghostscript would run
        raise ValueError("a picture is PostScript (EPS); convert it to PNG")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Return an RGB picture as it is looked at: turned as its EXIF data say."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"expected a picture, its bytes or a path, got {type(image).__name__}")
    # A phone's photograph may be several pictures (MPO), of which the first is the one that is shown.
    if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
        raise ValueError(f"a picture has {frames} frames; give one of them")
    if image.mode.startswith(DEEP):  # Pillow would cut values off at 255
        raise ValueError(f"a picture has more than 8 bits a channel (mode {image.mode}); convert it to RGB")
    # First: a composed picture has no EXIF data.
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:  # on white, as transformers' processors have it
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def picture_key(row: Mapping[str, Any]) -> bytes:
    """Return a digest of a row's pictures, encoded ones by their bytes, so that equal prompts of other pictures differ."""
    digest = hashlib.blake2b(digest_size=16)
    for value in (row.get("image"), *(row.get("images") or ())):
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.digest()


def encode_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row with its pictures as mappings of `bytes` and `path`, opened ones encoded without loss.

    `datasets` would read the file again that a picture was opened from, whatever was drawn on it since, or encode it as JPEG.

    Raises:
        ValueError: as `pictures_of`.
    """
    encoded = dict(row)
    if row.get("image") is not None:
        encoded["image"] = _encode(row["image"])
    if isinstance(row.get("images"), list | tuple):
        encoded["images"] = [*map(_encode, row["images"])]
    return encoded


def _encode(value: Any) -> Any:
    """Return a mapping of `bytes` and `path`, so that a column may have pictures of several kinds."""
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        # A fast level: PNG loses nothing at any of them.
        _upright(value).save(buffer, format="PNG", compress_level=1)
        value = buffer.getvalue()
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": None, "path": os.fspath(value)} if isinstance(value, str | os.PathLike) else value
