"""Files that a recipe names, and whether a job on a cluster will find them."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.packaging import Package
from cluster.sharding import STAGES
from pipeline.paths import IF_THERE
from pipeline.storage import is_uri

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["check_path", "find_path_problems", "named_paths"]

SHOWN = 5
"""Files that a message names."""
ADVICE = "or, if the cluster's nodes have it at that path, say so: --shared {}"


def find_path_problems(cfg: RunConfig, package: Package, shared: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Yield (path of the key, message) for every file that exists here and won't on the cluster."""
    for key, value in named_paths(cfg):
        if (problem := check_path(value, package, shared)) is not None:
            yield key, problem
    for key, module in _modules(cfg, package):
        if module.is_relative_to(package.root) and (problem := _left_out(module, package)) is not None:
            yield key, problem


def check_path(value: str, package: Package, shared: Sequence[Path]) -> str | None:
    """What keeps a job from finding a file, folder or glob, or None.

    Args:
        value: as the recipe gives it, relative to the working directory.
        package: what the job brings.
        shared: folders that the cluster's nodes have at the same paths.
    """
    path = Path(os.path.expanduser(value))
    absolute = Path(os.path.normpath(package.root / path))
    if path.is_absolute() and any(absolute.is_relative_to(folder) for folder in shared):
        return None
    is_inside = absolute.resolve().is_relative_to(package.root) or absolute.is_relative_to(package.root)
    found = [Path(name) for name in glob.glob(str(absolute), recursive=True)] if glob.has_magic(value) else [absolute]
    found = [name for name in found if name.exists()]
    if path.is_absolute() and not found:
        return None  # the cluster's own, if it is one
    if not is_inside:
        if not found:
            return f"{value!r} is outside the working directory {package.root}"
        where = f"{value!r} is outside the working directory {package.root}, which is all that a job brings"
        return f"{where}; copy it there, give a URI, {ADVICE.format(absolute.parent if absolute.is_file() else absolute)}"
    if path.is_absolute():
        relative = str(absolute.relative_to(package.root))
        return f"{value!r} is another path on the cluster; write {relative!r}, {ADVICE.format(value)}"
    return next((problem for name in found if (problem := _left_out(name, package)) is not None), None)


def _modules(cfg: RunConfig, package: Package) -> Iterator[tuple[str, Path]]:
    """(key, file or folder) of each module that the recipe names: plugins, which are loaded, and those of reward functions."""
    for index, name in enumerate(cfg.plugins or []):
        file = Path(sys.modules[name].__file__ or "").resolve()
        yield f"plugins.{index}", file.parent if file.name == "__init__.py" else file
    for index, reward in enumerate(cfg.trl.reward_funcs or [] if cfg.trl is not None else []):
        module = package.root.joinpath(*reward.split(".")[:-1])
        file = module.with_name(f"{module.name}.py")
        if module != package.root and (file.is_file() or module.is_dir()):
            yield f"trl.reward_funcs.{index}", file if file.is_file() else module


def _left_out(path: Path, package: Package) -> str | None:
    """What of a file or folder isn't packed, hidden files aside; None where all of it is."""
    files = [path]
    if path.is_dir():
        inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = [file for file in inside if not any(_is_hidden(part) for part in file.relative_to(path).parts)]
    names = [_relative(file, package) for file in files]
    missing = sorted(name for name in names if name not in package.files)
    if not missing:
        return None
    why = ".gitignore, .rayignore or a rule of prefray's leaves"
    if len(missing) == len(names):
        return f"{_relative(path, package)!r} isn't packed: {why} it out"
    shown = ", ".join(map(repr, missing[:SHOWN])) + f" and {len(missing) - SHOWN} more" * (len(missing) > SHOWN)
    return f"{_relative(path, package)!r} is packed in part: {why} {shown} out ({len(missing)} of {len(names)} files)"


def _is_hidden(part: str) -> bool:
    return part.startswith((".", "_")) and part != "__init__.py"


def _relative(path: Path, package: Package) -> str:
    return Path(os.path.normpath(path)).relative_to(package.root).as_posix()


def named_paths(cfg: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, value) for every value that may be a path; hub ids are told from paths by nothing being there."""
    for key in IF_THERE:
        if (value := getattr(cfg, key)) is not None and not is_uri(value):
            yield key, value
    if isinstance(cfg.deepspeed, str) and cfg.deepspeed not in STAGES:
        yield "deepspeed", cfg.deepspeed
    for index, reward in enumerate(cfg.trl.reward_funcs or [] if cfg.trl is not None else []):
        yield f"trl.reward_funcs.{index}", reward
    for name in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(cfg, name) or []):
            key = f"{name}.{index}"
            here = dataset.path.removeprefix("file://")
            if not is_uri(here):
                yield f"{key}.path", here
                if dataset.chat_template_jinja is not None:
                    yield f"{key}.chat_template_jinja", dataset.chat_template_jinja
            files = [dataset.data_files] if isinstance(dataset.data_files, str) else dataset.data_files or []
            if here in ("json", "jsonl", "csv", "parquet", "arrow"):
                yield from ((f"{key}.data_files", file) for file in files if not is_uri(file))
