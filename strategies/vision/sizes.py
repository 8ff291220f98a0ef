"""The size that pictures get before their processor: a config's `image_size`, or the one that a model was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["SAVED", "PictureSize", "card_facts", "size_of", "with_size"]

SAVED = "prefray"
"""Attribute of an image processor, which is saved with it: a mapping of `image_size` and `image_resize_algorithm`."""
LOADED = "prefray_loaded"
"""Attribute of a processor: the mapping that it was loaded with. It isn't one of those that are saved."""
RESAMPLING = [resampling.name.lower() for resampling in Image.Resampling]
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
    """Have `VisionProcessing` resize pictures for this processor, which is returned, and saves the size in its settings.

    Without a size, pictures have the one that the processor was saved with, if it was: its model knows them so.

    Raises:
        ValueError: when what it was saved with is no size.
    """
    images = processor.image_processor
    # What another config has set goes: a processor may serve several runs.
    settings = vars(processor).setdefault(LOADED, getattr(images, SAVED, None))
    if size is not None:
        whole = size if isinstance(size, int) else list(size)
        settings = {"image_size": whole, "image_resize_algorithm": algorithm or "bilinear"}
    vars(images).pop(SAVED, None)
    if settings is not None:
        setattr(images, SAVED, settings)
    size_of(processor)
    return processor


def size_of(processor: ProcessorMixin) -> PictureSize | None:
    """Return the size that `with_size` has set, or a processor was saved with; None for pictures as they are.

    Raises:
        ValueError: when what it was saved with is no size.
    """
    settings = getattr(getattr(processor, "image_processor", None), SAVED, None)
    match settings:
        case None:
            return None
        case {"image_size": int() as side, "image_resize_algorithm": name} if side > 0 and name in RESAMPLING:
            return PictureSize(side, name)
        case {"image_size": [int() as width, int() as height], "image_resize_algorithm": name} if (
            min(width, height) > 0 and name in RESAMPLING
        ):
            return PictureSize((width, height), name)
    raise ValueError(
        f"the processor's settings have {SAVED}: {settings!r}, which is no size of pictures; write image_size, a number or "
        f"[width, height], and image_resize_algorithm, one of {', '.join(RESAMPLING)}, or remove it"
    )


def card_facts(processor: ProcessorMixin | None) -> dict[str, str]:
    """Return, for a model's card, what is done with pictures before the processor, which saves it for prefray alone."""
    size = None if processor is None else size_of(processor)
    if size is None:
        return {}
    changed = (
        f"padded to {size.size} x {size.size}" if isinstance(size.size, int) else "stretched to {} x {}".format(*size.size)
    )
    return {"Pictures": f"{changed} pixels ({size.algorithm}) before the processor; prefray does so by itself, others must"}
