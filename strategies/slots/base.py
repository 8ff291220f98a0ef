"""The frozen base that several slots share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["BaseChanged", "CantShare", "SharedBase", "checksum"]


class BaseChanged(RuntimeError):
    """A trial has changed weights of the base, with which all others compute."""


class CantShare(ValueError):
    """A trial would change what others compute, or miss what it needs: it has to run without others."""


class SharedBase:
    """Holds a model's weights once, for any number of models that train adapters on them.

    Args:
        model: the base as `load_model` returns it. It is frozen, and must not be given to a trainer itself.

    Attributes:
        model: the base.
        is_divided: whether a forward of a model on it is one of all workers.
    """

    is_divided: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        model.requires_grad_(False)
        self.model = model
        self._checksums = self._read()

    def new_model(self) -> PreTrainedModel:
        """Return a model with modules and config of its own, whose parameters and buffers are the base's."""
        shared: dict[int, Any] = {id(tensor): tensor for tensor in self._tensors()}
        return copy.deepcopy(self.model, shared)

    def check_unchanged(self) -> None:
        """Check that no trainer has changed weights of the base.

        Raises:
            BaseChanged: naming a parameter.
        """
        changed = [name for name, now in self._read().items() if now != self._checksums[name]]
        if changed:
            raise BaseChanged(f"{len(changed)} weights of the shared base were changed, such as {changed[0]}")

    def check_frozen(self, model: nn.Module) -> None:
        """Check that a model of `new_model()`, whose adapter has been made, trains no weights of the base.

        Raises:
            CantShare: naming a parameter; the base is frozen again then.
        """
        shared = {id(parameter) for parameter in self.model.parameters()}
        trained = [name for name, one in model.named_parameters() if one.requires_grad and id(one) in shared]
        if trained:
            self.model.requires_grad_(False)
            raise CantShare(
                f"the adapter would train {len(trained)} weights of the shared base as well, such as {trained[0]} "
                "(bias: all, or lora_only, in an adapter_config.json)"
            )

    def names_in(self, model: nn.Module) -> list[str]:
        """Return the names that the base's parameters and buffers have in a model of `new_model()`, wrapped or not."""
        shared = {id(tensor) for tensor in self._tensors()}
        named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        return [name for name, tensor in named if id(tensor) in shared]

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters and buffers."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        # Tied weights, which have several names, come once.
        yield from self.model.parameters()
        yield from self.model.buffers()

    def _read(self) -> dict[str, Any]:
        return {name: checksum(parameter.detach()) for name, parameter in self.model.named_parameters()}


def checksum(tensor: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers, which no order of adding changes, and no move to a device."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    # As int64, of which sums are many times as fast; what doesn't fill one is added by bytes.
    whole = flat.numel() // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum(dtype=torch.int64))
