"""Files that a recipe names, and checks that a job on a cluster will find them."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cluster.packaging import Package, literal
from cluster.sharding import STAGES
from pipeline.config.loading import missing
from pipeline.config.packaged import is_packaged
from pipeline.config.paths import IF_THERE, absolute_paths
from pipeline.data.row_kinds import SourceFormat
from pipeline.data.sources.first_rows import first_rows
from pipeline.data.sources.pictures import is_data_url
from pipeline.data.transforms.base import RowError
from pipeline.data.transforms.pictures import picture_values
from pipeline.errors import UserError
from pipeline.io.storage import is_uri, without_scheme

if TYPE_CHECKING:
    from pipeline.config import RunConfig

__all__ = ["check_files", "check_path", "named_paths", "own_outputs", "recipe_in"]

SHOWN = 5
"""Files listed in a message."""
ADVICE = "or, if the cluster's nodes have it at that path, say so: --shared {}"


def recipe_in(root: Path, recipe: str) -> str:
    """Return the recipe's path within the working directory, or a packaged one's name, which comes with prefray's modules."""
    path = Path(os.path.expanduser(recipe))
    absolute = Path(os.path.abspath(path))
    if not absolute.is_file():
        absolute = root / path
    if not absolute.is_file():
        if is_packaged(recipe, root):
            return recipe
        raise UserError(missing(recipe))
    # `root` is resolved, so links in this path must be too.
    resolved = absolute.resolve()
    if not resolved.is_relative_to(root):
        raise UserError(
            f"recipe: {recipe!r} is outside the working directory {root}, which is all that a job brings; "
            "copy it there, or name the folder that holds recipe and data: --working-dir DIR"
        )
    return resolved.relative_to(root).as_posix()


def own_outputs(cfg: RunConfig) -> Iterator[str]:
    """Yield patterns of runs' outputs in the working directory, which jobs don't need."""
    inputs = [value for value in (cfg.base_model, cfg.reference_model, cfg.lora_model_dir) if value is not None]
    for where in (cfg.output_dir, cfg.dataset_prepared_path):
        relative = os.path.normpath(where)
        # The outputs' folder may hold the input of this run, as when an earlier run's adapter is trained on.
        is_input = any(Path(value).is_relative_to(relative) for value in inputs)
        if not is_uri(where) and not os.path.isabs(where) and not relative.startswith((".", "~")) and not is_input:
            yield literal(relative)


def check_files(recipe: str, cfg: RunConfig, package: Package, shared: tuple[Path, ...]) -> None:
    """Refuse a recipe, data or models that the job wouldn't find on the cluster, and an output that it can't write to."""
    absolute_paths(cfg)
    if not is_packaged(recipe, package.root) and (problem := check_path(recipe, package, ())) is not None:
        raise UserError(f"recipe: {problem}")
    folders = [Path(os.path.abspath(os.path.expanduser(folder))) for folder in shared]
    found = [(key, check_path(value, package, folders)) for key, value in named_paths(cfg)]
    if not any(problem for _, problem in found):
        found += _missing_pictures(cfg, package, folders)
    modules = [(key, module) for key, module in _modules(cfg, package) if module.is_relative_to(package.root)]
    found += [(key, _left_out(module, package)) for key, module in modules]
    if problems := [f"{key}: {problem}" for key, problem in found if problem is not None]:
        raise UserError("\n".join(problems))


def check_path(value: str, package: Package, shared: Sequence[Path]) -> str | None:
    """Return why a job won't find a file, folder or glob, or None.

    Args:
        value: of the recipe, relative to the working directory.
        package: files that the job uploads.
        shared: folders that the cluster's nodes have at the same paths.
    """
    path = Path(os.path.expanduser(value))
    absolute = Path(os.path.normpath(package.root / path))
    if path.is_absolute() and any(absolute.is_relative_to(folder) for folder in shared):
        return None
    # Inside by its own path, or as the target of a symbolic link.
    is_inside = absolute.resolve().is_relative_to(package.root) or absolute.is_relative_to(package.root)
    # A file may have a name that reads like a pattern.
    is_pattern = glob.has_magic(value) and not absolute.exists()
    matches = [Path(name) for name in glob.glob(str(absolute), recursive=True)] if is_pattern else [absolute]
    matches = [name for name in matches if name.exists()]
    if path.is_absolute() and not matches:
        return None  # a path of the cluster's nodes, if it exists at all
    if not is_inside:
        if not matches:
            return f"{value!r} is outside the working directory {package.root}"
        message = f"{value!r} is outside the working directory {package.root}, which is all that a job brings"
        return f"{message}; copy it there, give a URI, {ADVICE.format(absolute.parent if absolute.is_file() else absolute)}"
    if path.is_absolute():
        relative = str(absolute.relative_to(package.root))
        return f"{value!r} is another path on the cluster; write {relative!r}, {ADVICE.format(value)}"
    return next((problem for name in matches if (problem := _left_out(name, package)) is not None), None)


def _missing_pictures(cfg: RunConfig, package: Package, shared: Sequence[Path]) -> Iterator[tuple[str, str | None]]:
    """Yield (key, problem) of each dataset whose first rows name a picture that the job won't find."""
    for name in ("datasets", "test_datasets"):
        for index, dataset in enumerate(getattr(cfg, name) or []):
            path = without_scheme(dataset.path)
            # A hub id isn't looked up.
            if is_uri(path) or not (package.root / os.path.expanduser(path)).exists():
                continue
            rows = first_rows({**dataset.model_dump(exclude_none=True), "path": str(package.root / os.path.expanduser(path))})
            problems = (
                f"the picture of row {row.index + 1}, {problem}"
                for file, row in rows
                for value in _local_pictures(row.value or {}, os.path.dirname(file), package)
                if (problem := check_path(value, package, shared)) is not None
            )
            yield f"{name}.{index}.path", next(problems, None)


def _local_pictures(row: dict[str, Any], folder: str, package: Package) -> Iterator[str]:
    """Yield the paths of a row's pictures, of those beside its file relative to the working directory if they lie in it."""
    with suppress(RowError):
        for value in picture_values(row):
            path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
            if not isinstance(path, str) or is_data_url(path) or is_uri(path := without_scheme(path)):
                continue
            path = os.path.expanduser(path)
            beside = os.path.normpath(os.path.join(folder, path))
            is_inside = not os.path.isabs(path) and Path(beside).is_relative_to(package.root)
            yield os.path.relpath(beside, package.root) if is_inside else beside


def _modules(cfg: RunConfig, package: Package) -> Iterator[tuple[str, Path]]:
    """Yield (key, file or folder) of each module that the recipe names: plugins, which are loaded, and reward functions."""
    for index, name in enumerate(cfg.plugins or []):
        # Loading the recipe has imported its plugins.
        file = Path(sys.modules[name].__file__ or "").resolve()
        yield f"plugins.{index}", file.parent if file.name == "__init__.py" else file
    for index, reward in enumerate(cfg.trl.reward_funcs or [] if cfg.trl is not None else []):
        module = package.root.joinpath(*reward.split(".")[:-1])
        file = module.with_name(f"{module.name}.py")
        if module != package.root and (file.is_file() or module.is_dir()):
            yield f"trl.reward_funcs.{index}", file if file.is_file() else module


def _left_out(path: Path, package: Package) -> str | None:
    """Return which part of a file or folder isn't packed, hidden files aside; None where all of it is."""
    files = [path]
    if path.is_dir():
        inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        # pyarrow's datasets leave such files out too, so data are complete without them.
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
    """Yield (key, value) for every value that may be a path; hub ids are included, since only the disk distinguishes them."""
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
            path = without_scheme(dataset.path)
            if not is_uri(path):
                yield f"{key}.path", path
                if dataset.chat_template_jinja is not None:
                    yield f"{key}.chat_template_jinja", dataset.chat_template_jinja
            files = [dataset.data_files] if isinstance(dataset.data_files, str) else dataset.data_files or []
            if path in get_args(SourceFormat):
                yield from ((f"{key}.data_files", file) for file in files if not is_uri(file))
