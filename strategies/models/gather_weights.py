"""Writing a sharded model as one, parameter by parameter, so that no worker holds the full model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from strategies.compat import converts_weights, unsaved_weights

__all__ = ["gather", "write_whole"]

FILE_BYTES = 2**32
"""Maximum bytes of one file of weights, and so of what the writing worker holds beside its own part."""
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""Prefixes that wrappers of layers add to parameter names."""


def gather(model: Any, wanted: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield every saved parameter and buffer in full; every rank must iterate over all of them.

    A tensor is valid until the next one is yielded. Of tied weights only the first is yielded.

    Args:
        model: sharded by ZeRO or FSDP2, or not at all.
        wanted: names; None for all.
    """
    # Only the names: under ZeRO-3 these values are empty. They lack buffers that aren't persistent.
    saved = {_plain(name) for name in model.state_dict()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = _plain(name)
        if plain in saved and (wanted is None or plain in wanted):
            with _whole(tensor) as whole:
                yield plain, whole


def write_whole(model: Any, folder: Path, writes: bool) -> None:
    """Write the model as a folder that `from_pretrained` loads. Every rank must call it.

    Args:
        model: as in `gather`, a model of transformers.
        writes: whether this rank writes.
    """
    left_out = unsaved_weights(model)
    tensors = ((name, tensor) for name, tensor in gather(model) if name not in left_out)
    if converts_weights(model):
        # Names and shapes on disk differ from the model's; only transformers can convert them, all at once.
        state = {name: tensor.detach().cpu().clone() for name, tensor in tensors if writes}
        if writes:
            model.save_pretrained(folder, state_dict=state)
        return
    if writes:
        # Write the configs. transformers also writes a file of no weights.
        model.save_pretrained(folder, state_dict={})
        (folder / "model.safetensors").unlink(missing_ok=True)
    files = _Files(folder)
    # On ranks that don't write as well, here and above: gathering each tensor is collective.
    for name, tensor in tensors:
        if writes:
            files.add(name, tensor)
    if writes:
        files.finish()


class _Files:
    """Writes weights into files of at most `FILE_BYTES`, with transformers' file names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: dict[str, Tensor] = {}
        self.files: list[list[str]] = []
        self.held_bytes = self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self.held and self.held_bytes + size > FILE_BYTES:
            self._write()
        # A copy even on a CPU: the gathered tensor is freed when the next one is yielded.
        self.held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.held_bytes += size
        self.total_bytes += size

    def finish(self) -> None:
        self._write()
        count = len(self.files)
        # A process that was killed may have left more of them.
        for left in set(self.folder.glob("partial-*.safetensors")) - {self._partial(index) for index in range(count)}:
            left.unlink()
        if count == 1:
            self._partial(0).rename(self.folder / "model.safetensors")
            return
        # transformers' names contain the number of files, which is known only now.
        names = [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
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
        # `full_tensor` is differentiable: of a trained parameter it would return a tensor with a graph.
        with torch.no_grad():
            yield tensor.full_tensor()
    else:
        yield tensor.data
