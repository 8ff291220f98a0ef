"""Which tensors a merged model has, and what each of them is."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from strategies.merging.adapter import EmptyPolicy
from strategies.merging.names import StoredNames
from strategies.merging.weights import Weights

__all__ = ["MergePlan", "Output"]


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model."""

    name: str
    """In the files: the base's own name for it."""
    parameter: str | None
    """The model's parameter that it is, or is a part of; None for a tensor that the model has no use for."""
    shape: torch.Size
    dtype: torch.dtype
    is_merged: bool = False
    """Whether the adapter has changed it."""
    is_rounded: bool = False
    """Whether its values had to be rounded to the dtype."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class MergePlan:
    """The tensors of base + adapter. A sum is computed in float32 and rounded once, to the dtype that it is written in.

    Weights that are one in the base (embedding and head) stay one where the adapter has changed them alike; else the model's
    config unties them, and both are written.

    Args:
        weights: the base's tensors.
        policy: its adapter.
        dtype: of all floating-point tensors; each one's own in the base when None.

    Raises:
        ValueError: when the base is incomplete, or the adapter changes what can't be stored as the base's files store it.
    """

    def __init__(self, weights: Weights, policy: EmptyPolicy, dtype: torch.dtype | None = None) -> None:
        self._weights, self._policy, self._dtype = weights, policy, dtype
        self._changed = policy.changed()
        self._ready: dict[str, torch.Tensor] = {}
        """Merged parameters that are not written yet, by the parameters' names."""
        self._ready_parts: dict[str, torch.Tensor] = {}
        """The same of those that are stored in parts, by the parts' names."""
        self._names = StoredNames(policy.base, policy.slots, list(weights.shapes()), as_loaded=weights.whole is not None)
        self._check()
        untied = self._untied()
        self.is_untied = bool(untied)
        self.outputs = [self._output(name, self._names.parameter_of.get(name)) for name in weights.shapes()]
        self.outputs += [self._output(name, name) for name in untied if name not in self._names.whole]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def merged(self) -> list[Output]:
        """The tensors that the adapter has changed."""
        return [output for output in self.outputs if output.is_merged]

    @property
    def rounded(self) -> dict[str, torch.dtype]:
        """The model's parameters that are rounded, and to what."""
        return {output.parameter: output.dtype for output in self.outputs if output.is_rounded and output.parameter is not None}

    @property
    def main_dtype(self) -> torch.dtype:
        """What most of the bytes are."""
        sizes: Counter[torch.dtype] = Counter()
        for output in self.outputs:
            sizes[output.dtype] += output.nbytes
        return sizes.most_common(1)[0][0]

    def config(self) -> Any:
        """The merged model's config."""
        config = self._policy.base.config
        config.dtype = self._dtype or self._policy.dtype or self.main_dtype
        if self.is_untied:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        return config

    def tensor(self, output: Output) -> torch.Tensor:
        """The contents of an output.

        Raises:
            ValueError: when a sum isn't finite, in float32 or in its dtype.
        """
        rounded = self._value(output).to(output.dtype).contiguous()
        if output.is_merged and not torch.isfinite(rounded).all():
            dtype = str(output.dtype).removeprefix("torch.")
            raise ValueError(f"{output.name} has values that {dtype} can't hold; merge it into another dtype, such as float32")
        return rounded

    def _value(self, output: Output) -> torch.Tensor:
        name, parameter = output.name, output.parameter
        if parameter is None or not output.is_merged:
            return self._weights.read(name) if name in self._weights.shapes() else self._base_value(str(parameter))
        if parameter in self._names.parts:
            if name not in self._ready_parts:
                self._ready_parts |= self._names.scatter(parameter, self._merged(parameter))
            return self._ready_parts.pop(name)
        return self._merged(parameter)

    def _merged(self, parameter: str) -> torch.Tensor:
        """A parameter with the adapter in it, which is computed once, with the others of its module."""
        if parameter not in self._changed:
            return self._base_value(parameter)  # which the adapter's folder replaces
        if parameter not in self._ready:
            self._ready |= self._policy.merge(self._changed[parameter], self._base_value)
        return self._ready.pop(parameter)

    def _check(self) -> None:
        policy, names = self._policy, self._names
        for parameter, slot in policy.slots.items():
            replaced = policy.replaced(parameter) is not None
            if parameter in names.parts:
                if (parameter in self._changed or replaced) and not names.can_scatter(parameter, slot.get().shape):
                    raise ValueError(
                        f"the adapter changes {parameter}, which the base's files hold in several tensors that it can't be "
                        "taken apart into again; use the base with the adapter unmerged"
                    )
            elif not replaced and self._source(parameter) is None:
                raise ValueError(f"the base model lacks weights, such as {parameter}; give a complete model")
        for parameter, name in names.whole.items():
            if policy.replaced(parameter) is None:
                self._check_shape(name, parameter)

    def _check_shape(self, name: str, parameter: str) -> None:
        stored, wanted = self._weights.shapes()[name], self._policy.slots[parameter].get().shape
        if stored == wanted:
            return
        if (tokens := self._policy.grown_to) is not None and stored[1:] == wanted[1:]:
            raise ValueError(
                f"the adapter has embeddings for {tokens} tokens, and none for {parameter}, which the base model has for "
                f"{stored[0]}; save it with save_embedding_layers=True"
            )
        raise ValueError(f"the base model's {name} has the shape {list(stored)}, and its config wants {list(wanted)}")

    def _output(self, name: str, parameter: str | None) -> Output:
        shapes = self._weights.shapes()
        stored = self._weights.dtype(name if name in shapes else self._source(str(parameter)) or name)
        dtype = self._dtype if self._dtype is not None and stored.is_floating_point else stored
        is_merged = parameter is not None and any(
            each in self._changed or self._policy.replaced(each) is not None for each in self._alike(parameter)
        )
        loses = stored.is_floating_point and torch.promote_types(stored, dtype) != dtype
        is_whole = parameter is not None and parameter not in self._names.parts
        shape = self._policy.slots[str(parameter)].get().shape if is_whole else shapes[name]
        return Output(name, parameter, shape, dtype, is_merged, is_merged or loses)

    def _alike(self, parameter: str) -> list[str]:
        """The names that a written tensor stands for."""
        return [parameter] if self.is_untied else self._policy.tied.get(parameter, [parameter])

    def _untied(self) -> list[str]:
        """Parameters that are one in the base and that the adapter has changed differently."""
        found: list[str] = []
        groups = {tuple(group) for group in self._policy.tied.values() if any(name in self._changed for name in group)}
        for group in groups:
            for name in group:
                if name in self._changed and name not in self._ready:
                    self._ready |= self._policy.merge(self._changed[name], self._base_value)
            values = [self._ready[name] if name in self._changed else self._base_value(name) for name in group]
            if all(torch.equal(values[0], value) for value in values[1:]):
                written = next(name for name in group if name in self._names.whole)
                self._changed[written] = ""
                self._ready = {name: value for name, value in self._ready.items() if name not in group} | {written: values[0]}
            else:
                found += group
        return found

    def _source(self, parameter: str) -> str | None:
        """Name of the stored tensor of a parameter, its own or that of one that it is tied to."""
        names = [parameter, *self._policy.tied.get(parameter, ())]
        return next((self._names.whole[name] for name in names if name in self._names.whole), None)

    def _base_value(self, parameter: str) -> torch.Tensor:
        """A parameter of the base in float32; a copy."""
        value = self._policy.replaced(parameter)
        if value is None and parameter in self._names.parts:
            return self._names.gather(parameter, lambda name: self._weights.read(name).float())
        if value is None:
            source = self._source(parameter)
            assert source is not None, parameter
            value = self._weights.read(source)
        return value.to(torch.float32, copy=True)
