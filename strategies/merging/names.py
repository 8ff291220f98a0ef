"""What a model's parameters are called in its files: by other names, and some of them in several tensors (experts).

transformers renames, stacks and concatenates while it loads, and takes apart again when it saves. The functions are its own;
PEFT calls them too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

__all__ = ["StoredNames"]


class StoredNames:
    """Names in files, and the model's parameters.

    Args:
        model: a model of that class; its weights count for nothing.
        parameters: names of its parameters.
        stored: names in the files.
        as_loaded: the files' names are the model's already.
    """

    def __init__(self, model: Any, parameters: Any, stored: list[str], as_loaded: bool = False) -> None:
        self._model = model
        self.parameter_of: dict[str, str] = {}
        """Stored name -> the parameter that it is, or is a part of; what the model has no use for is left out."""
        self.whole: dict[str, str] = {}
        """Parameter -> the stored tensor that it is."""
        self.parts: dict[str, dict[str, str]] = {}
        """Parameter -> the stored tensors that it is made of, and the pattern by which each was recognised."""
        transforms = [] if as_loaded else get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._converters = {pattern: each for each in converters for pattern in each.source_patterns}
        for name in sorted(stored, key=dot_natural_key):
            renamed, pattern = rename_source_key(
                name, renamings, converters, model.base_model_prefix, dict.fromkeys(parameters, 1)
            )
            if renamed not in parameters and name in parameters:
                renamed, pattern = name, None
            if renamed not in parameters:
                continue
            self.parameter_of[name] = renamed
            if pattern is None:
                self.whole[renamed] = name
            else:
                self.parts.setdefault(renamed, {})[name] = pattern

    def gather(self, parameter: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Make a parameter of its parts."""
        parts = self.parts[parameter]
        converter = copy.deepcopy(self._converters[next(iter(parts.values()))])
        for name, pattern in parts.items():
            converter.add_tensor(parameter, name, pattern, read(name))
        made = converter.convert(parameter, model=self._model, config=self._model.config)[parameter]
        return made[0] if isinstance(made, list) else made

    def scatter(self, parameter: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Take a parameter apart again; stored name -> tensor."""
        return revert_weight_conversion(self._model, {parameter: tensor})

    def can_scatter(self, parameter: str, shape: torch.Size) -> bool:
        """Whether taking it apart gives the tensors that it was made of."""
        return set(self.scatter(parameter, torch.empty(shape, device="meta"))) == set(self.parts[parameter])
