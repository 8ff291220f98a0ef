"""Whether model and processor belong together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from strategies.vision.sizes import SAVED, size_of

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = ["check_belongs", "image_settings", "takes_pictures"]

NOT_SETTINGS = ("processor_class", "_processor_class", SAVED)
"""What an image processor says of the processor that it is a part of, and what `size_of` reads."""


def takes_pictures(config: Any) -> bool:
    """Return whether a model's config has a tower of pictures."""
    return getattr(config, "vision_config", None) is not None


def check_belongs(config: Any, processor: ProcessorMixin, given: str) -> None:
    """Check that a model finds pictures where a processor puts them.

    Args:
        config: the model's.
        given: name of the model, for messages.

    Raises:
        ValueError: for a model that takes no pictures, and for one in which they have another token.
    """
    if not takes_pictures(config):
        raise ValueError(
            f"{given!r} ({config.model_type}) takes no pictures; give a vision-language model, or rows of text alone"
        )
    # LLaVA and its kin call it an index.
    expected = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    written = {getattr(processor, "image_token_id", None), *getattr(processor, "image_token_ids", ())} - {None}
    if expected is not None and written and expected not in written:
        raise ValueError(
            f"{type(processor).__name__} writes the tokens {sorted(written)} for a picture, and {given!r} looks for "
            f"{expected}: the processor belongs to another model, or the tokenizer was changed; give the model's own"
        )


def image_settings(processor: ProcessorMixin) -> dict[str, Any]:
    """Return all that decides the pixels of a picture, as JSON values."""
    images = processor.image_processor
    kept = {name: value for name, value in images.to_dict().items() if name not in NOT_SETTINGS}
    # By its class too: Pillow and torchvision, whichever is installed, resize differently.
    size = size_of(processor)
    resized = {} if size is None else {"image_size": size.size, "image_resize_algorithm": size.algorithm}
    return json.loads(json.dumps({**kept, "class": type(images).__name__, **resized}, default=str, sort_keys=True))
