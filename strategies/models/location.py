"""Location of a model: a folder, a hub id, a GGUF file, a file of an installed package, or the local copy of a URI."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "ADAPTER_CONFIG",
    "ModelLocation",
    "is_hub_id",
    "is_remote",
    "local_values",
    "model_values",
    "resolve_model_location",
    "use_copy",
]

ADAPTER_CONFIG = "adapter_config.json"
"""File that marks the folder of an adapter."""
KEYS = ("base_model", "base_model_config", "tokenizer_config", "reference_model", "lora_model_dir")
"""Keys that name a model, or a part of one."""
PACKAGE_SCHEME = "pkg://"

_COPIES: dict[str, Path] = {}
"""URI -> its folder or file on this machine. A config keeps the URI, which what is written names on any machine."""


def is_remote(given: str) -> bool:
    """Return whether a config value is a URI, whose files are read from a copy on this machine."""
    return "://" in given and not given.startswith((PACKAGE_SCHEME, "file://"))


def is_hub_id(given: str) -> bool:
    """Return whether a config value names a model of the hub: no URI, no installed package, and no folder of this machine."""
    return "://" not in given and not given.endswith(".gguf") and not Path(os.path.expanduser(given)).is_dir()


def use_copy(uri: str, path: Path) -> None:
    """Read the model at a URI from a folder or file of this machine, in this process."""
    _COPIES[uri] = path


def model_values(cfg: Any) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of every model that a config names, reward models among them."""
    yield from ((key, value) for key in KEYS if (value := getattr(cfg, key, None)) is not None)
    trl = getattr(cfg, "trl", None)
    for index, reward in enumerate(trl.reward_funcs or [] if trl is not None else []):
        if "/" in reward:
            yield f"trl.reward_funcs.{index}", reward


def local_values(cfg: Any) -> dict[str, str]:
    """Return the keys of models at URIs with this machine's copies, for a process that writes no names of models."""
    return {key: str(_COPIES[value]) for key in KEYS if (value := getattr(cfg, key)) in _COPIES}


@dataclass(frozen=True)
class ModelLocation:
    """Arguments of `from_pretrained`: a path or hub id, and `gguf_file` for GGUF weights."""

    key: str
    given: str
    path: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are a GGUF file, which transformers dequantizes on load."""
        return "gguf_file" in self.kwargs


def resolve_model_location(given: str, key: str = "base_model") -> ModelLocation:
    """Resolve a config value to the location of a model.

    Raises:
        ValueError: for a local path that doesn't exist, a package or file that is not installed, or a URI without a copy.
    """
    path = given
    if given.startswith(PACKAGE_SCHEME):
        path = str(_package_file(given, key))
    if is_remote(given):
        if given not in _COPIES:
            raise ValueError(f"{key}: {given!r} is at a URI, which only `pipeline` fetches; copy it to this machine")
        path = str(_COPIES[given])
    local = Path(os.path.expanduser(path))
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ValueError(f"{key}: no such file: {given!r}")
        return ModelLocation(key, given, str(local.parent), {"gguf_file": local.name})
    if local.exists():
        return ModelLocation(key, given, str(local))
    # No hub id begins so or has more than one slash: the error names the path, not a repository that doesn't exist.
    if path.startswith(("/", "./", "../", "~")) or path.count("/") > 1:
        raise ValueError(f"{key}: no such folder: {given!r}; give a folder, a hub id (owner/name), or a .gguf file")
    return ModelLocation(key, given, path)


def _package_file(given: str, key: str) -> Path:
    package, _, name = given.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{key}: {given!r} needs the package {package!r}, which is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / name
    if not path.exists():
        raise ValueError(f"{key}: the package {package!r} carries no file {name!r}")
    return path
