"""A transformers processor, as preference rows need it: ids of texts with pictures, and pixels of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from strategies.vision.sizes import size_of

__all__ = ["VisionProcessing"]

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs of a model that are 1 at a picture's tokens."""


@dataclass(frozen=True)
class VisionProcessing:
    """Wraps a processor; created where a model's processor isn't a plain tokenizer."""

    processor: ProcessorMixin

    def prompt_ids(self, text: str, images: Sequence[Image.Image]) -> list[int]:
        """Return the ids of a prompt; each picture's placeholder is expanded to as many tokens as the model has for it.

        Raises:
            ValueError: if the number of placeholders isn't that of the pictures.
        """
        pictures = {"images": [self._sized(images)]} if images else {}
        # A chat template has written special tokens into the text.
        return self.processor(text=[text], **pictures, add_special_tokens=False)["input_ids"][0]

    def expansion(self, image: Image.Image) -> str:
        """Return the text that the processor puts in place of `image_token` for a picture.

        Raises:
            ValueError: for a processor that writes no such text.
        """
        token = self.processor.image_token
        try:
            inputs = self.processor(text=[token], images=[self._sized([image])], return_text_replacement_offsets=True)
        # Of an argument that older processors don't have.
        except TypeError as error:
            raise ValueError(
                f"{type(self.processor).__name__} doesn't say which tokens stand for a picture: {error}"
            ) from error
        replacements = inputs.get("text_replacement_offsets")
        if not replacements or len(replacements[0]) != 1:
            raise ValueError(f"{type(self.processor).__name__} doesn't say which tokens stand for a picture")
        return replacements[0][0]["replacement"]

    def picture_ids(self) -> list[int]:
        """Return the ids of tokens that stand for parts of pictures, which no text may hold."""
        return sorted({self.processor.image_token_id, *self.processor.image_token_ids} - {None})

    def _sized(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        size = size_of(self.processor)
        return list(images) if size is None else [size.apply(image) for image in images]

    def completion_ids(self, text: str) -> list[int]:
        """Return the ids of a completion, in which no picture stands."""
        return self.processor(text=[text], add_special_tokens=False)["input_ids"][0]

    @property
    def image_token(self) -> int:
        """Id of the token that stands for a part of a picture."""
        # Not `image_token_id`: of Gemma 3 that is what begins a picture in a text.
        return next(token for token in self.processor.image_token_ids if token is not None)

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return the model's inputs for pictures, in their order."""
        # The whole processor would want a text with placeholders as well.
        processor = self.processor.image_processor
        inputs = processor(self._sized(images), return_tensors="pt")
        return {name: torch.as_tensor(inputs[name]) for name in processor.model_input_names if name in inputs}

    @property
    def token_types(self) -> tuple[str, ...]:
        """Names of the model's inputs that mark the tokens of pictures; most models have none."""
        return tuple(name for name in TOKEN_TYPES if name in self.processor.model_input_names)

    def blank(self) -> tuple[list[int], Image.Image]:
        """Return a small picture and the ids of a prompt that is this picture alone."""
        # Grey: a model may drop a picture whose values are all 0 as padding.
        image = Image.new("RGB", (32, 32), (85, 85, 85))
        return self.prompt_ids(self.processor.image_token, [image]), image
