"""Which tensors a merged model has, and what each of them is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from strategies.merging.adapter import EmptyPolicy
from strategies.merging.weights import Weights

__all__ = ["MergePlan", "Output"]


@dataclass(frozen=True)
class Output:
    """A tensor of the merged model."""

    name: str
    """In the files: the base's own name for it."""
    parameter: str | None
    """Name of the model's parameter; None for a tensor that becomes one only with others, or none at all."""
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
        ValueError: when the base isn't the adapter's, is incomplete, or is stored in a form that would have to be taken apart.
    """

    def __init__(self, weights: Weights, policy: EmptyPolicy, dtype: torch.dtype | None = None) -> None:
        self._weights, self._policy, self._dtype = weights, policy, dtype
        self._changed = policy.changed()
        self._ready: dict[str, torch.Tensor] = {}
        self._stored_as: dict[str, str] = {}
        parameter_of = self._match()
        self._check(parameter_of)
        untied = self._untied()
        self.is_untied = bool(untied)
        self.outputs = [self._output(name, parameter_of[name]) for name in weights.shapes()]
        written = {output.parameter for output in self.outputs}
        self.outputs += [self._output(name, name) for name in untied if name not in written]

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

    def tensor(self, output: Output) -> torch.Tensor:
        """The contents of an output.

        Raises:
            ValueError: when a sum isn't finite, in float32 or in its dtype.
        """
        name = output.parameter
        if name is not None and name in self._ready:
            value = self._ready.pop(name)
        elif name is not None and name in self._changed:
            self._ready |= self._policy.merge(self._changed[name], self._base_value)
            value = self._ready.pop(name)
        elif name is not None and (replaced := self._policy.replaced(name)) is not None:
            value = replaced
        elif name is not None and name not in self._stored_as:
            value = self._base_value(name)
        else:
            value = self._weights.read(output.name if name is None else self._stored_as[name])
        rounded = value.to(output.dtype).contiguous()
        if output.is_merged and not torch.isfinite(rounded).all():
            raise ValueError(
                f"{output.name} has values that {_word(output.dtype)} can't hold; merge it into another dtype, such as float32"
            )
        return rounded

    def _match(self) -> dict[str, str | None]:
        """Which parameter each stored tensor is, as transformers' own loading finds it."""
        if self._weights.whole is not None:
            known = self._policy.slots
            parameter_of: dict[str, str | None] = {name: name if name in known else None for name in self._weights.shapes()}
            self._fused: set[str] = set()
        else:
            parameter_of, self._fused = _parameters(self._policy.base, self._policy.slots, list(self._weights.shapes()))
        self._stored_as = {parameter: name for name, parameter in parameter_of.items() if parameter is not None}
        return parameter_of

    def _check(self, parameter_of: dict[str, str | None]) -> None:
        policy = self._policy
        if fused := sorted(
            self._fused & {*self._changed, *(name for name in policy.slots if policy.replaced(name) is not None)}
        ):
            raise ValueError(
                f"the adapter changes {fused[0]}, which the base's files hold in several tensors, and merging into those isn't "
                "supported; save the base with all its weights as the model holds them, or use it with the adapter unmerged"
            )
        missing = [name for name in policy.slots if name not in self._fused and self._source(name) is None]
        if missing := [name for name in missing if policy.replaced(name) is None]:
            raise ValueError(f"the base model lacks {len(missing)} of its weights, such as {missing[0]}; give a complete model")
        for name, parameter in parameter_of.items():
            stored = self._weights.shapes()[name]
            if parameter is None or policy.replaced(parameter) is not None:
                continue
            if stored != (wanted := self._shape(parameter)):
                if policy.grown_to is not None and stored[1:] == wanted[1:]:
                    raise ValueError(
                        f"the adapter has embeddings for {policy.grown_to} tokens, and none for {parameter}, which the base "
                        f"model has for {stored[0]}; save it with save_embedding_layers=True"
                    )
                raise ValueError(f"the base model's {name} has the shape {list(stored)}, and its config wants {list(wanted)}")

    def _output(self, name: str, parameter: str | None) -> Output:
        source = name if parameter is None else self._source(parameter) or name
        stored = self._weights.dtype(source)
        dtype = self._dtype if self._dtype is not None and stored.is_floating_point else stored
        is_merged = parameter is not None and any(
            each in self._changed or self._policy.replaced(each) is not None for each in self._alike(parameter)
        )
        loses = stored.is_floating_point and torch.promote_types(stored, dtype) != dtype
        shape = self._weights.shapes()[name] if parameter is None else self._shape(parameter)
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
                self._changed |= {name: self._changed.get(name, "") for name in group}
                self._ready |= dict.fromkeys(group, values[0])
            else:
                found += group
        return found

    def _source(self, parameter: str) -> str | None:
        """Name of the stored tensor of a parameter, its own or that of one that it is tied to."""
        names = [parameter, *self._policy.tied.get(parameter, ())]
        return next((self._stored_as[name] for name in names if name in self._stored_as), None)

    def _base_value(self, parameter: str) -> torch.Tensor:
        """A parameter of the base in float32; a copy."""
        value = self._policy.replaced(parameter)
        if value is None:
            source = self._source(parameter)
            assert source is not None, parameter
            value = self._weights.read(source)
        return value.to(torch.float32, copy=True)

    def _shape(self, parameter: str) -> torch.Size:
        return self._policy.slots[parameter].get().shape


def _parameters(model: Any, known: Any, names: list[str]) -> tuple[dict[str, str | None], set[str]]:
    """Stored names -> the model's; and the parameters that are made of several stored tensors, whose names stand for none.

    transformers renames while it loads (old names, a missing prefix), and makes one tensor of several (experts). The functions
    are its own, which PEFT calls too.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    found: dict[str, str | None] = {}
    fused: set[str] = set()
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, dict(known))
        if renamed not in known and name in known:
            renamed, pattern = name, None
        if pattern is not None:
            fused.add(renamed)
        found[name] = renamed if renamed in known and pattern is None else None
    return found, fused


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
