"""The pictures of a forward, and their encoding once for both completions of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from strategies.media import PICTURES as COLUMNS
from strategies.vision.images import pictures_of
from strategies.vision.modules import inner_model
from strategies.vision.processing import VisionProcessing

__all__ = ["PICTURES", "PictureCollator", "Pictures", "first_rows", "given_pictures", "pictures_of_forward", "run_padded"]

PICTURES = "pictures"
"""Key of a padded batch that holds its `Pictures`."""
IMAGES = "images"
"""Key of a padded batch that holds the pictures of each row as the rows have them: encoded, or paths."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of a forward, in the order of their prompts.

    Without the processor that made them: loader processes send it with every batch, and a tokenizer has megabytes.
    """

    pixels: dict[str, Tensor]
    """The model's inputs, such as `pixel_values`; the first dimension runs over pictures, or parts of them."""
    image_token: int
    token_types: tuple[str, ...] = ()
    """As of `VisionProcessing`."""
    unscored: tuple[int, ...] = ()
    """Tokens of a blank picture that is fed only so that every worker runs the model's tower."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Pictures:
        """Return the pictures with `change` applied to every tensor."""
        return replace(self, pixels={name: change(tensor) for name, tensor in self.pixels.items()})

    def to(self, device: torch.device, non_blocking: bool = False) -> Pictures:
        """Return the pictures on `device`; called by accelerate."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs beside `ids`, in which the tokens of the pictures stand, of any shape."""
        return {**self.pixels, **dict.fromkeys(self.token_types, (ids == self.image_token).long())}

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return next(iter(self.pixels.values())).device

    def pin_memory(self) -> Pictures:
        """Return the pictures in pinned host memory; called by torch's data loader."""
        return self.map(Tensor.pin_memory)


def given_pictures(rows: Sequence[Mapping[str, Any]], vision: VisionProcessing | None) -> Pictures | None:
    """Make the pixels of the pictures of rows; None where they have none, or `vision` is None."""
    images = [image for row in rows for image in pictures_of(row)] if vision is not None else []
    return pictures_of_forward([images], vision) if images and vision is not None else None


def pictures_of_forward(rows: Sequence[Sequence[Image.Image]], vision: VisionProcessing) -> Pictures:
    """Make the pixels of the pictures of each row of a forward; rows without any get a blank one."""
    images = [image for row in rows for image in row]
    unscored: list[int] = []
    if not images:
        unscored, blank = vision.blank()
        images = [blank]
    return Pictures(vision.pixels(images), vision.image_token, vision.token_types, tuple(unscored))


@dataclass(frozen=True)
class PictureCollator:
    """Adds the pictures of a batch to what a collator of prepared rows makes."""

    text: Callable[[list[dict[str, Any]]], dict[str, Any]]
    vision: VisionProcessing

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        columns = [{name: row.get(name) for name in COLUMNS} for row in rows]
        pictures = pictures_of_forward([*map(pictures_of, columns)], self.vision)
        return {**self.text(rows), IMAGES: columns, PICTURES: pictures}


def first_rows(batch: dict[str, Any], number: int, vision: VisionProcessing | None = None) -> dict[str, Any]:
    """Return the first rows of a padded batch; `vision` is needed where it has pictures."""
    first = {name: values[:number] for name, values in batch.items() if name != PICTURES}
    # Made again, since pixels can't be cut by rows: a picture may be several parts of them.
    if (pictures := batch.get(PICTURES)) is not None and vision is not None and number < len(batch[IMAGES]):
        pictures = pictures_of_forward([*map(pictures_of, first[IMAGES])], vision).to(pictures.device)
    return first if pictures is None else {**first, PICTURES: pictures}


def run_padded(model: Any, inputs: dict[str, Tensor], pictures: Pictures | None, copies: int = 1, **options: Any) -> Any:
    """Run padded sequences with their pictures; returns the outputs of TRL's fused head, fields of shape (rows, T - 1).

    Args:
        inputs: `input_ids`, `attention_mask` and `labels`, shape (rows, T).
        pictures: of the first `rows / copies` sequences; the others have the same ones, which are encoded once.
    """
    _unshard_head(model)
    if pictures is None:
        return model(**inputs, use_cache=False, fused_lm_head=True, **options)
    rows, columns = inputs["input_ids"].shape
    if pictures.unscored:
        inputs = _append(inputs, pictures.unscored, copies)
    # Repeated although only the first part is encoded: Qwen2-VL, for example, reads its grids for positions as well.
    repeated = pictures.map(lambda tensor: torch.cat([tensor] * copies))
    arguments = {**inputs, **repeated.inputs(inputs["input_ids"]), **options}
    with encoded_once(model, copies) if copies > 1 else nullcontext():
        outputs = model(**arguments, use_cache=False, fused_lm_head=True)
    for name, value in outputs.items() if pictures.unscored else ():
        if isinstance(value, Tensor) and value.ndim == 2:
            outputs[name] = value[:rows, : columns - 1]
    return outputs


def _unshard_head(model: Any) -> None:
    """Gather an output head that FSDP2 has in a group of its own, as accelerate's do where it finds no last norm beside it.

    The module's forward would do so, and TRL's fused head doesn't call it: it gathers the weight itself, and then each worker
    has the gradient of its own rows alone.
    """
    while hasattr(model, "module"):
        model = model.module
    head = model.get_output_embeddings()
    if hasattr(head, "unshard"):
        head.unshard()


def _append(inputs: dict[str, Tensor], ids: Sequence[int], copies: int) -> dict[str, Tensor]:
    """Append `copies` sequences of `ids` without labels; the shorter sequences are padded."""
    like = inputs["input_ids"]
    row = like.new_tensor([ids] * copies)
    others = {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.full_like(row, -100)}
    width = max(like.shape[1], len(ids))
    # Ids of 0 do as padding: attention and labels leave it out.
    fill = {"labels": -100}
    return {
        name: torch.cat([pad(part, (0, width - part.shape[1]), value=fill.get(name, 0)) for part in (tensor, others[name])])
        for name, tensor in inputs.items()
    }


@contextmanager
def encoded_once(model: Any, copies: int) -> Iterator[None]:
    """Within it the model encodes the first of `copies` equal parts of the pictures that it is given, for all parts."""
    inner = inner_model(model)
    encode = inner.get_image_features

    def first(value: Any) -> Any:
        return value[: len(value) // copies] if isinstance(value, Tensor) and value.ndim else value

    def repeat(value: Any) -> Any:
        return torch.cat([value] * copies) if isinstance(value, Tensor) else list(value) * copies

    @wraps(encode)
    def encode_first(*args: Any, **kwargs: Any) -> Any:
        features = encode(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
        # One encoding in the graph: the gradients of all copies add up in it.
        features.pooler_output = repeat(features.pooler_output)
        if getattr(features, "deepstack_features", None) is not None:  # a tensor for each of some layers
            features.deepstack_features = [repeat(layer) for layer in features.deepstack_features]
        return features

    # On the instance, where it hides the class's method until it is deleted.
    inner.get_image_features = encode_first
    try:
        yield
    finally:
        del inner.get_image_features
