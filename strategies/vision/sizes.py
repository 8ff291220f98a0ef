"""The size that a config's `image_size` gives pictures before their processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["PictureSize", "size_of", "with_size"]

ATTRIBUTE = "picture_size"
"""Attribute of a processor; it isn't one of those that are saved with it."""
Processor = TypeVar("Processor", bound="ProcessorMixin")


@dataclass(frozen=True)
class PictureSize:
    """Size in pixels: a number for the side of a square, padded with black, or (width, height); and Pillow's resampling."""

    size: int | tuple[int, int]
    algorithm: str = "bilinear"

    def apply(self, image: Image.Image) -> Image.Image:
        """Return the picture in this size."""
        method = Image.Resampling[self.algorithm.upper()]
        if isinstance(self.size, int):
            # As Axolotl: the shape of what is seen stays.
            return ImageOps.pad(image, (self.size, self.size), method=method, color=(0, 0, 0))
        return image.resize(self.size, method)


def with_size(processor: Processor, size: Any, algorithm: str | None) -> Processor:
    """Have `VisionProcessing` resize pictures for this processor, which is returned; without a size, leave them alone."""
    # A size that another config has set, too: a processor may serve several runs.
    vars(processor).pop(ATTRIBUTE, None)
    if size is not None:
        whole = size if isinstance(size, int) else tuple(size)
        setattr(processor, ATTRIBUTE, PictureSize(whole, algorithm or "bilinear"))
    return processor


def size_of(processor: ProcessorMixin) -> PictureSize | None:
    """Return the size that `with_size` has set; None for pictures as they are."""
    return getattr(processor, ATTRIBUTE, None)
