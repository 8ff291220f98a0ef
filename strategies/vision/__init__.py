"""Pairs about pictures: their processor, raw rows, and the pictures of a forward.

A prepared row keeps its pictures as encoded files in `images`, beside ids in which each picture's placeholder tokens stand
already. Pixels are made where a forward is collated, in the data loader's workers, and a prompt's pictures are encoded once
for both of its completions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.lazy import lazy_names

if TYPE_CHECKING:
    from strategies.vision.images import decode_picture, picture_format
    from strategies.vision.processing import VisionProcessing
    from strategies.vision.sizes import size_of, with_size
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "strategies.vision.images": "decode_picture picture_format",
            "strategies.vision.processing": "VisionProcessing",
            "strategies.vision.sizes": "size_of with_size",
        },
    )

__all__ = ["VisionProcessing", "decode_picture", "picture_format", "size_of", "with_size"]
