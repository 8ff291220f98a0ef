"""Datasets of the Hugging Face hub."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.data.sources.arrow import decoded_rows, without_nulls
from pipeline.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["hub_keys", "load", "rows", "survey"]


def hub_keys(dataset: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the arguments of `datasets.load_dataset`, hashable and in a fixed order."""
    files = dataset.get("data_files")
    return (
        ("path", dataset["path"]),
        ("name", dataset.get("name")),
        # Never None: `load_dataset` would return a dict of all splits.
        ("split", dataset.get("split") or "train"),
        ("revision", dataset.get("revision")),
        ("data_files", tuple(files) if isinstance(files, list | tuple) else files),
    )


# Each shard of a worker process asks for it again.
@functools.lru_cache(maxsize=4)
def load(keys: tuple[tuple[str, Any], ...]) -> Dataset:
    """Load the dataset, memory-mapped from the local hub cache.

    Raises:
        UserError: when the hub cannot be reached or has no such dataset, configuration, split or file.
    """
    import datasets

    arguments = dict(keys)
    # `hub_keys` made it a tuple, to be hashable.
    if isinstance(arguments["data_files"], tuple):
        arguments["data_files"] = list(arguments["data_files"])
    try:
        return datasets.load_dataset(**arguments)
    # `datasets` raises these for errors that a user can fix; all its own error classes derive from them
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"path: {arguments['path']!r} is no local file or folder, and loading it from the Hugging Face hub failed: {reason}"
        ) from error


def rows(dataset: Dataset, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Yield rows [first, last), pictures as they are stored: mappings of `bytes` and `path`."""
    chosen = dataset.select(range(first, last))
    if not _has_pictures(dataset.features):
        yield from map(without_nulls, chosen)
        return
    # `datasets` would decode pictures, and their files' own bytes be lost.
    for batch in chosen.with_format("arrow")[:].to_batches():
        yield from decoded_rows(batch)


def _has_pictures(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_has_pictures, feature.values()))
    # A list has one feature for all of its elements.
    inner = getattr(feature, "feature", None) if not isinstance(feature, list) else feature[0]
    return type(feature).__name__ == "Image" or (inner is not None and _has_pictures(inner))


def survey(keys: tuple[tuple[str, Any], ...]) -> tuple[str, int]:
    """Return an identity of the dataset's content, and its number of rows.

    The names of the hub's files contain the commit, so they identify the content.
    """
    loaded = load(keys)
    files = sorted(loaded.info.download_checksums or ())
    # A dataset without downloads, such as one read from a local copy, has only the fingerprint of `datasets`.
    return "\n".join(files) or loaded._fingerprint, loaded.num_rows
