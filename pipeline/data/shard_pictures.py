"""Pictures of a shard's rows, in the task that prepares it: read, checked, written to the store, and counted in tokens."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.data.pictures import picture_name, read_picture, store_picture
from pipeline.data.sources.filesystem import folder_of
from pipeline.data.sources.pictures import PictureReader, is_data_url
from pipeline.data.tokenize import Tokenised
from pipeline.data.transforms.base import Rendered, RowError
from pipeline.data.transforms.control import ESCAPE
from pipeline.errors import UserError
from pipeline.io.storage import Folder
from strategies import vision

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["PreparedPicture", "ShardPictures", "without_data"]


@dataclass(frozen=True)
class PreparedPicture:
    """A picture in the store.

    `expansion` is the text that the processor puts in place of its token, with `tokens` tokens of pictures.
    """

    name: str
    expansion: str
    tokens: int


class ShardPictures:
    """Prepares the pictures of a shard's rows; equal ones once.

    Args:
        processor: the model's.
        location: of the data file; None for a dataset of the hub.
        store: folder of the store.
    """

    def __init__(self, processor: ProcessorMixin, location: str | None, store: Folder) -> None:
        self._vision = vision.VisionProcessing(processor)
        self._token = re.compile(re.escape(processor.image_token))
        self._picture_ids = np.asarray(self._vision.picture_ids(), dtype=np.int64)
        self._reader = PictureReader(None if location is None else folder_of(location))
        self._store = store
        self._by_path: dict[str, PreparedPicture] = {}
        self._by_name: dict[str, PreparedPicture] = {}
        self._is_compared = False

    def read_ahead(self, values: Sequence[Any]) -> None:
        """Begin to fetch a row's pictures, as far as they are on other machines; `prepare` must follow."""
        self._reader.read_ahead(value for value in values if not (isinstance(value, str) and value in self._by_path))

    def prepare(self, values: Sequence[Any]) -> tuple[PreparedPicture, ...]:
        """Read the pictures of a row, check them, and write them to the store.

        Raises:
            RowError: for a picture that can't be read, or that the model can't take; HostFailed for one at a dead host.
            OSError: if the store can't be written.
        """
        try:
            return tuple(self._prepare(value) for value in values)
        finally:
            self._reader.forget(values)

    def _prepare(self, value: Any) -> PreparedPicture:
        path = value if isinstance(value, str) and not is_data_url(value) else None
        if path in self._by_path:
            return self._by_path[path]
        data = self._reader.read(value)
        try:
            name = picture_name(data, vision.picture_format(data))
            prepared = self._by_name.get(name) or self._checked(name, data)
        # A processor may not take any shape: Qwen's refuse a picture 200 times as wide as high.
        except (ValueError, ArithmeticError) as error:
            raise RowError(f"{error} ({path})" if path is not None and path not in str(error) else str(error)) from error
        self._by_name[name] = prepared
        if path is not None:
            self._by_path[path] = prepared
        return prepared

    def _checked(self, name: str, data: bytes) -> PreparedPicture:
        expansion = self._vision.expansion(vision.decode_picture(data))
        # Before its rows are known to be kept: the bytes of a whole part may not fit into memory.
        store_picture(self._store, name, data)
        ids = self._vision.processor.tokenizer(expansion, add_special_tokens=False)["input_ids"]
        # One string of all pictures of a size: with tiles it has kilobytes.
        return PreparedPicture(name, sys.intern(expansion), self._count(ids))

    def expanded(self, text: Rendered, pictures: Sequence[PreparedPicture]) -> Rendered:
        """Return the text with each picture's token expanded, as the processor would."""
        return text.map_texts(lambda one: self._expanded(one, pictures)) if pictures else text

    def _expanded(self, text: str, pictures: Sequence[PreparedPicture]) -> str:
        expansions = iter(picture.expansion for picture in pictures)
        return self._token.sub(lambda _: next(expansions), text)

    def compare(self, text: Rendered, ids: Tokenised, pictures: Sequence[PreparedPicture]) -> None:
        """Compare the first prompt's ids with those of the processor on the whole prompt.

        Raises:
            UserError: if they differ, as with a processor that adds text of its own (PaliGemma's).
        """
        # Plain text gets BOS, and escaped text is tokenised in pieces.
        if self._is_compared or not pictures or not text.templated or ESCAPE in text.prompt:
            return
        self._is_compared = True
        images = [vision.decode_picture(read_picture(self._store, picture.name)) for picture in pictures]
        whole = self._vision.prompt_ids(text.prompt, images)[: len(ids.prompt)]
        if not np.array_equal(whole, ids.prompt):
            raise UserError(
                f"base_model: its {type(self._vision.processor).__name__} makes other tokens of a prompt than of its text and "
                "pictures, which prepared data can't hold; train such a model without Ray (strategies.train)"
            )

    def problem(self, rows: Sequence[Tokenised], pictures: Sequence[PreparedPicture]) -> str | None:
        """Return why the ids of a row don't fit its pictures, for which the model would fail or take others; else None."""
        expected = sum(picture.tokens for picture in pictures)
        for ids in rows:
            if any(self._count(completion) for completion in ids.completions):
                return "an answer has tokens that stand for parts of pictures"
            if (count := self._count(ids.prompt)) != expected:
                return f"the prompt has {count} tokens that stand for parts of pictures, and its pictures have {expected}"
        return None

    def _count(self, ids: Any) -> int:
        return int(np.isin(np.asarray(ids, dtype=np.int64), self._picture_ids).sum())


def without_data(value: Any) -> Any:
    """Return a row's value without the bytes of its pictures, but with their number."""
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, str):
        return (
            f"{value[:40]}... <{len(value)} characters>" if is_data_url(value) and ";base64," in value[:80].lower() else value
        )
    if isinstance(value, dict):
        # Base64 without a URL stands only under these names.
        names = ("base64", *(["data"] if value.get("type") == "base64" else []))
        bare = {name: f"<{len(value[name])} characters>" for name in names if isinstance(value.get(name), str)}
        return {name: bare.get(name) or without_data(member) for name, member in value.items()}
    return [without_data(member) for member in value] if isinstance(value, list) else value
