"""Writing a sharded model as one: parameter by parameter, so that no worker holds all of it beside its own part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["gather", "write_whole"]

FILE_BYTES = 2**32
"""Of one file of weights, and so of the most that the writing worker holds beside its own part."""
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of names that wrappers of layers add."""


def gather(model: Any, wanted: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter and each buffer that is saved, whole, in turn; every rank must take all of them.

    A tensor is valid until the next one is asked for. Of tied weights the first is given.

    Args:
        model: sharded by ZeRO or FSDP2, or not at all.
        wanted: names; None for all.
    """
    saved = {_plain(name) for name in model.state_dict()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = _plain(name)
        if plain in saved and (wanted is None or plain in wanted):
            with _whole(tensor) as whole:
                yield plain, whole


def write_whole(model: Any, folder: Path, writes: bool) -> None:
    """Write the model as a folder that `from_pretrained` loads; every rank must call it.

    Args:
        model: as in `gather`, a model of transformers.
        writes: whether this rank writes.
    """
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors = ((name, tensor) for name, tensor in gather(model) if name not in left_out)
    if getattr(model, "_weight_conversions", None):
        # The names and shapes on disk are others than those of the model; transformers translates, of all at once.
        state = {name: tensor.detach().cpu().clone() for name, tensor in tensors if writes}
        if writes:
            model.save_pretrained(folder, state_dict=state)
        return
    if writes:
        # What stands beside the weights. transformers leaves a file for the weights that it wasn't given.
        model.save_pretrained(folder, state_dict={})
        (folder / "model.safetensors").unlink(missing_ok=True)
    files = _Files(folder)
    for name, tensor in tensors:
        if writes:
            files.add(name, tensor)
    if writes:
        files.finish()


class _Files:
    """Weights in files of at most `FILE_BYTES`, named as transformers names them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.held_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.held_bytes + size > FILE_BYTES:
            self._write()
        self.held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.held_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        self._write()
        number = len(self.files)
        if number == 1:
            self._partial(0).rename(self.folder / "model.safetensors")
            return
        names = [f"model-{index:05d}-of-{number:05d}.safetensors" for index in range(1, number + 1)]
        for index, name in enumerate(names):
            self._partial(index).rename(self.folder / name)
        weights = {weight: name for name, held in zip(names, self.files, strict=True) for weight in held}
        listing = {"metadata": {"total_size": self.total_bytes}, "weight_map": weights}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2) + "\n")

    def _write(self) -> None:
        save_file(self.held, str(self._partial(len(self.files))), metadata={"format": "pt"})
        self.files.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def _partial(self, index: int) -> Path:
        return self.folder / f"partial-{index}.safetensors"


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextmanager
def _whole(tensor: Any) -> Iterator[Tensor]:
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.data
    elif hasattr(tensor, "full_tensor"):
        with torch.no_grad():
            yield tensor.full_tensor()
    else:
        yield tensor.data
