"""A shared base whose layers are divided among the workers: each is whole only while it computes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from strategies.compat import unsplit_layers, writes_counted
from strategies.slots.base import BaseChanged, SharedBase, checksum

__all__ = ["DividedBase"]

GATHER = "gather_layer"
"""Attribute of the modules of a layer, and of what PEFT puts around them: a function that makes the layer whole."""


class DividedBase(SharedBase):
    """Holds a part of each layer's weights, and gathers a layer from all workers when a model on the base needs it.

    Models have whole tensors as parameters, as on any shared base, but the memory of a layer's is freed when another layer is
    gathered: a worker holds one whole layer at a time. What isn't in layers (embeddings, output head, last norm) is whole on
    every worker: each forward begins and ends with it, so that gathered it would only be held beside its part.

    A layer is gathered for its forward, for its backward, and when PEFT wraps a module of it, since DoRA begins with the norms
    of weights. Nothing else may read its weights. All workers must run the same models in the same order.

    Args:
        model: as of `SharedBase`, and whole. Layers are divided one by one: beside what was loaded this process holds one more
            layer, and a GPU one layer beside its parts.
        device: type of the device on which layers compute, such as `cuda`.
        classes: of the layers, by their names; those that the model says are not to be split when none are given.

    Raises:
        ValueError: if the model has no such layers.
    """

    is_divided = True

    def __init__(self, model: PreTrainedModel, device: str = "cpu", classes: Collection[str] = ()) -> None:
        model.requires_grad_(False)
        names = set(classes) or unsplit_layers(model)
        layers = list(_outermost(model, names))
        if not layers:
            given = f"of class {', '.join(sorted(names))}" if names else "that it says are not to be split"
            raise ValueError(
                f"base_model: {model.config.model_type} has no layers {given}, which could be divided among the workers; "
                "remove fsdp_config or deepspeed, or write share_base: false"
            )
        mesh, own = init_device_mesh(device, (dist.get_world_size(),)), _of_one_layer(model, layers)
        self._names = {weight: name for name, weight in model.named_parameters() if weight in own}
        self._gathered, self._parts = _Gathered(), []
        for layer in layers:
            part = _Part([weight for weight in layer.parameters() if weight in own], mesh)
            self._parts.append(part)
            _gather_for(layer, part, self._gathered)
        hook = register_module_module_registration_hook(_gather_what_is_wrapped)
        weakref.finalize(self, hook.remove)
        super().__init__(model)

    @property
    def nbytes(self) -> int:
        """Bytes that this worker holds between layers: its parts, and what isn't divided."""
        whole = sum(tensor.nbytes for tensor in self._tensors() if tensor not in self._names)
        return whole + sum(values.nbytes for part in self._parts for values in part.own_values())

    def check_unchanged(self) -> None:
        """Check, by the parts of this worker and by what autograd counts, that no trainer has changed weights of the base.

        Raises:
            BaseChanged: naming a parameter.
        """
        self._gathered.clear()
        for parameter, name in self._names.items():
            if parameter.untyped_storage().nbytes():
                raise BaseChanged(f"weights of the shared base were replaced, such as {name}")
        super().check_unchanged()

    def _read(self) -> dict[str, Any]:
        self._gathered.clear()
        found: dict[str, Any] = {}
        for part in self._parts:
            for parameter, values in zip(part.whole, part.own_values(), strict=True):
                # What is written to a gathered layer is lost with it, but counted.
                found[self._names[parameter]] = checksum(values), writes_counted(parameter)
        whole = {name: parameter for name, parameter in self.model.named_parameters() if parameter not in self._names}
        return found | {name: checksum(parameter.detach()) for name, parameter in whole.items()}


class _Weight(nn.Parameter):
    """A weight of a divided layer. Its memory is FSDP2's, and freed most of the time: trainers can't move or cast it."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return this weight, where it is already what is asked for: to `cpu:0`, torch would copy one on `cpu`.

        Raises:
            ValueError: for a device of another type, or another dtype.
        """
        wanted = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if (wanted.dtype, wanted.device.type) != (self.dtype, self.device.type):
            raise ValueError(
                f"a divided base stays {self.dtype} on {self.device}; wanted was {wanted.dtype} on {wanted.device}"
            )
        return self


class _Part(nn.Module):
    """This worker's part of a layer's weights: never called, but gathered by FSDP2.

    Attributes:
        whole: the layer's own parameters, which have contents only while the layer is gathered.
    """

    def __init__(self, weights: list[nn.Parameter], mesh: DeviceMesh) -> None:
        super().__init__()
        self.whole = tuple(weights)
        for number, weight in enumerate(weights):
            weight.data = weight.data.contiguous()  # all that FSDP2 takes
            self.register_parameter(str(number), weight)
        fully_shard(self, mesh=mesh)
        # FSDP2 fills the same memory whenever it gathers: autograd, too, finds the weights there that it has saved.
        self.unshard()
        for weight, gathered in zip(weights, self.parameters(), strict=True):
            weight.data = gathered.detach()
            weight.__class__ = _Weight
        self.reshard()

    def own_values(self) -> list[Tensor]:
        """Return this worker's parts of the weights, flat; only while the layer isn't gathered."""
        return [parameter.to_local() for parameter in self.parameters()]


class _Gathered:
    """The one layer that is whole."""

    def __init__(self) -> None:
        self._part: _Part | None = None

    def set(self, part: _Part) -> None:
        """Gather a layer in place of the one before."""
        if part is not self._part:
            self.clear()
            part.unshard()
            self._part = part

    def clear(self) -> None:
        """Free the layer that is whole."""
        if self._part is not None:
            self._part.reshard()
            self._part = None


def _outermost(module: nn.Module, classes: Collection[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in classes:
            yield child
        else:
            yield from _outermost(child, classes)


def _of_one_layer(model: nn.Module, layers: list[nn.Module]) -> set[nn.Parameter]:
    """Return the weights that one layer has and nothing else; others are needed when that layer isn't whole."""
    inside = {module for layer in layers for module in layer.modules()}
    outside = {weight for module in model.modules() if module not in inside for weight in module.parameters(recurse=False)}
    layers_of = Counter(weight for layer in layers for weight in layer.parameters())
    # A number without dimensions has no parts.
    return {weight for weight, number in layers_of.items() if number == 1 and weight.ndim and weight not in outside}


def _gather_for(layer: nn.Module, part: _Part, gathered: _Gathered) -> None:
    """Let a layer, and all copies of it, gather its weights whenever they are needed."""

    # Functions, which `deepcopy` doesn't copy: those of all copies gather the same weights.
    def gather(*_: Any) -> None:
        gathered.set(part)

    def gather_before_backward(layer: nn.Module, inputs: Any, outputs: Any) -> None:
        recursively_apply(lambda output: output.requires_grad and output.register_hook(gather), outputs)

    layer.register_forward_pre_hook(gather)
    layer.register_forward_hook(gather_before_backward)
    for module in layer.modules():
        setattr(module, GATHER, gather)


def _gather_what_is_wrapped(module: nn.Module, name: str, child: nn.Module | None) -> None:
    """Gather the layer to which a module belongs that gets a child, or becomes one; both belong to it from now on."""
    for one in (child, module):
        gather = getattr(one, GATHER, None)
        if gather is not None:
            gather()
            setattr(module, GATHER, gather)
            setattr(child, GATHER, gather)
            return
