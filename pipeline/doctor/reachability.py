"""Check that a model or data set can be reached from this process."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from pipeline.errors import UserError
from pipeline.io.first_answer import check_answer
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, is_uri, locate, reason
from strategies.models.location import resolve_model_location

__all__ = ["reach"]

HUB_TIMEOUT_S = 8


def reach(value: str, kind: str) -> str | None:
    """Return why a model or data set can't be reached, or None.

    Args:
        value: a path, a URI, a hub id, or (models) `pkg://PACKAGE/FILE`.
        kind: `model` or `data`.
    """
    if kind == "model":
        try:
            path = resolve_model_location(value).path
        except ValueError as error:
            # Without the key, by default base_model, which the check's own name replaces.
            return str(error).partition(": ")[2]
        return None if Path(path).exists() else _reach_hub(path, "model")
    if is_uri(value) and not value.startswith("file://"):
        return _reach_uri(value)
    path = str(locate(value))
    if os.path.exists(path) or (glob.has_magic(path) and glob.glob(path, recursive=True)):
        return None
    # Only OWNER/NAME is asked of the hub: anything else is a path with a typo.
    if value.count("/") == 1 and not value.startswith((".", "/", "~")):
        return _reach_hub(value, "dataset")
    return f"no such file or folder: {path}"


def _reach_uri(uri: str) -> str | None:
    try:
        folder = Folder(uri)
        check_answer(uri, folder.filesystem, folder.path)
        info = folder.filesystem.get_file_info(folder.path)
    except UserError as error:
        return str(error)
    except STORAGE_ERRORS as error:
        return reason(error)
    return "there is nothing at this URI" if info.type.name == "NotFound" and not glob.has_magic(uri) else None


def _reach_hub(repository: str, kind: str) -> str | None:
    """Look into the hub's local cache, then ask the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    name = "config.json" if kind == "model" else "README.md"
    # It returns a path, None for unknown, or an object for a file that is known to be absent.
    if isinstance(try_to_load_from_cache(repository, name, repo_type=kind), str):
        return None
    # Its base classes are the errors of the HTTP library that the hub's client is built on.
    failures: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, OSError, ValueError)
    try:
        HfApi().repo_info(repository, repo_type=kind, timeout=HUB_TIMEOUT_S)
    except failures as error:
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return f"it isn't in the hub's cache, and the hub doesn't give it: {line}"
    return None
