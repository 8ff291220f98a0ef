"""The tensors of a base model, by the names that its files give them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from strategies.gguf import unpacked
from strategies.locations import ModelLocation, resolve_model_location
from strategies.models import load_config, load_model

__all__ = ["LoadedWeights", "StoredWeights", "Weights", "open_weights", "plain"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes that a model which isn't quantized has."""
ON_DISK = ("revision", "cache_dir", "token", "local_files_only")
"""Arguments of `from_pretrained` that only say where files come from."""
IN_MEMORY = (
    "attn_implementation",
    "device_map",
    "dtype",
    "low_cpu_mem_usage",
    "max_memory",
    "quantization_config",
    "torch_dtype",
)
"""Those that only say how the model is held and computed."""


class Weights(Protocol):
    """Tensors of a base by their names, in the order in which they are read best."""

    whole: str | None
    """Why the model had to be loaded whole; None where it wasn't."""

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is stored in."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in whatever dtype it is held."""


class StoredWeights:
    """Tensors in safetensors files; only what is read is in memory.

    Raises:
        ValueError: for a file that is no safetensors file, or has a dtype of quantized weights.
    """

    whole: str | None = None

    def __init__(self, files: Iterable[Path]) -> None:
        self._found: dict[str, tuple[Path, torch.Size, torch.dtype]] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        part = opened.get_slice(name)
                        self._found[name] = (file, torch.Size(part.get_shape()), _dtype(part.get_dtype(), file, name))
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{str(file)!r} can't be read: {error}") from error

    def shapes(self) -> dict[str, torch.Size]:
        return {name: shape for name, (_, shape, _) in self._found.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._found[name][2]

    def read(self, name: str) -> torch.Tensor:
        # Opened anew each time: pages of a file that stays mapped count as this process's memory.
        with safe_open(self._found[name][0], "pt") as opened:
            return opened.get_tensor(name)


class LoadedWeights:
    """Tensors of a model in memory."""

    def __init__(self, model: Any, dtype: torch.dtype, whole: str) -> None:
        self.whole: str | None = whole
        self._dtype = dtype
        self._tensors: dict[str, torch.Tensor] = {}
        known: set[int] = set()
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in known:  # the second name of a tied weight
                known.add(tensor.data_ptr())
                self._tensors[name] = tensor

    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        held = self._tensors[name].dtype
        return self._dtype if held.is_floating_point else held

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def open_weights(cfg: Any) -> Weights:
    """The weights of `cfg.base_model`: streamed where they are safetensors, else from the model, loaded whole in float32.

    Raises:
        ValueError: when there is no model, it is incomplete or damaged, or it is stored quantized.
    """
    location = resolve_model_location(cfg.base_model)
    config = load_config(cfg)
    if not location.is_gguf and (quantized := getattr(config, "quantization_config", None)):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else getattr(quantized, "quant_method", None)
        raise ValueError(
            f"base_model: {location.given!r} is stored quantized ({method}), and a sum with an adapter would have to be "
            "quantized again; give the model that it was made from with --base"
        )
    try:
        folder = unpacked(location, "weights")
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ValueError(f"base_model: no model could be loaded from {location.given!r}: {error}") from error
    files = None if folder.is_gguf else _safetensors(folder, cfg)
    if files is not None:
        return StoredWeights(files)
    dtype = torch.float32 if location.is_gguf else getattr(config, "dtype", None) or torch.float32
    why = "it is a large GGUF file" if location.is_gguf else "it isn't stored as plain safetensors"
    return LoadedWeights(load_model(plain(cfg)), dtype, why)


def plain(cfg: Any) -> Any:
    """The config of the same weights in float32 on a CPU: neither quantized nor computed in a special way."""
    kwargs = {name: value for name, value in (cfg.overrides_of_model_kwargs or {}).items() if name not in IN_MEMORY}
    off = {"load_in_4bit": False, "load_in_8bit": False, "bnb_config_kwargs": None, "bf16": False, "attn_implementation": None}
    return cfg.model_copy(update={**off, "overrides_of_model_kwargs": kwargs or None})


def _safetensors(location: ModelLocation, cfg: Any) -> list[Path] | None:
    """The files of the base in the order of its index; None where it isn't such files."""
    arguments = plain(cfg).overrides_of_model_kwargs or {}
    if set(arguments) - set(ON_DISK):
        return None  # such as `variant`: transformers knows where to look
    if cfg.revision_of_model:
        arguments = {"revision": cfg.revision_of_model, **arguments}
    if (single := _find(location, SINGLE, arguments)) is not None:
        return [single]
    if (index := _find(location, INDEX, arguments)) is None:
        return None
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found = {name: _find(location, name, arguments) for name in names}
    if missing := [name for name, file in found.items() if file is None]:
        raise ValueError(f"base_model: {location.given!r} lacks {missing[0]}, which its index names; give a complete model")
    return [file for file in found.values() if file is not None]


def _find(location: ModelLocation, name: str, arguments: dict[str, Any]) -> Path | None:
    """A file of the model, from a folder or the hub (its local copy, where the hub can't be asked)."""
    from transformers.utils import cached_file

    try:
        found = cached_file(location.path, name, _raise_exceptions_for_missing_entries=False, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(f"base_model: no model could be loaded from {location.given!r}: {error}") from error
    return Path(found) if found is not None else None


def _dtype(name: str, file: Path, tensor: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(
            f"base_model: {tensor} in {str(file)!r} has the dtype {name}, of quantized weights, with which an adapter can't be "
            "merged; give the model that it was made from with --base"
        )
    return DTYPES[name]
