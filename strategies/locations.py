"""Where a model lies: a folder, a hub id, a GGUF file, or a file that an installed package carries."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ADAPTER_CONFIG", "ModelLocation", "resolve_model_location"]

ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder an adapter's."""
PACKAGE_SCHEME = "pkg://"


@dataclass(frozen=True)
class ModelLocation:
    """What `from_pretrained` needs: a path or hub id, and `gguf_file` where the weights are GGUF."""

    key: str
    given: str
    path: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are a GGUF file, which transformers turns into plain tensors on load."""
        return "gguf_file" in self.kwargs


def resolve_model_location(given: str, key: str = "base_model") -> ModelLocation:
    """Find the model that a config value names.

    Raises:
        ValueError: for a path that looks local and isn't there, or a package or file that is not installed.
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
