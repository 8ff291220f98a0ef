"""Location of a model: a folder, a hub id, a GGUF file, or a file of an installed package."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ADAPTER_CONFIG", "ModelLocation", "resolve_model_location"]

ADAPTER_CONFIG = "adapter_config.json"
"""File that marks the folder of an adapter."""
PACKAGE_SCHEME = "pkg://"


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
        ValueError: for a local path that doesn't exist, or a package or file that is not installed.
    """
    path = given
    if given.startswith(PACKAGE_SCHEME):
        path = str(_package_file(given, key))
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
