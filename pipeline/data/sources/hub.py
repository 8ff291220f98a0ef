"""Datasets of the Hugging Face hub."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["hub_keys", "load", "survey"]


def hub_keys(dataset: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What `datasets.load_dataset` is called with, hashable and in a fixed order."""
    files = dataset.get("data_files")
    return (
        ("path", dataset["path"]),
        ("name", dataset.get("name")),
        ("split", dataset.get("split") or "train"),
        ("revision", dataset.get("revision")),
        ("data_files", tuple(files) if isinstance(files, list | tuple) else files),
    )


@functools.lru_cache(maxsize=4)
def load(keys: tuple[tuple[str, Any], ...]) -> Dataset:
    """The dataset, memory-mapped from the local hub cache.

    Raises:
        UserError: when the hub cannot be reached or has no such dataset, configuration, split or file.
    """
    import datasets

    wanted = dict(keys)
    if isinstance(wanted["data_files"], tuple):
        wanted["data_files"] = list(wanted["data_files"])
    try:
        return datasets.load_dataset(**wanted)
    # datasets raises these for what a user can mend; all its own errors derive from them
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"path: {wanted['path']!r} is no local file or folder, and loading it from the Hugging Face hub failed: {reason}"
        ) from error


def survey(keys: tuple[tuple[str, Any], ...]) -> tuple[str, int]:
    """What stands for the content, and the number of rows.

    The hub's files are named with the commit they come from, so their names stand for their content.
    """
    loaded = load(keys)
    files = sorted(loaded.info.download_checksums or ())
    return "\n".join(files) or loaded._fingerprint, loaded.num_rows
