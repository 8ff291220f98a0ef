"""What is merged: the adapter of a run, or one in a folder, and the base model that it was trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import parse_saved
from pipeline.data.store import Prepared, open_store
from pipeline.errors import UserError
from pipeline.storage import Folder, Location, fetch, inside, is_uri, locate
from pipeline.training.finished import finished_run, holds_run
from pipeline.training.folder import CONFIG, RunFolder
from strategies.config import as_config
from strategies.locations import ADAPTER_CONFIG
from strategies.merging.adapter import read_adapter_config

__all__ = ["Source", "open_source"]

MERGED = "merged"


@dataclass(frozen=True)
class Source:
    """An adapter and its base."""

    given: str
    cfg: Any
    """The run's config, or one that names the base alone."""
    adapter: Path
    output: Location | None
    """Where the merged model goes when nothing else is said."""
    base_fingerprint: str | None = None
    """Of the base model that the run began with."""
    prepared: Prepared | None = None
    """The data that it was trained on, where they are still there."""


@contextmanager
def open_source(given: str, base: str | None) -> Iterator[Source]:
    """Find the adapter that `given` names; from a URI it is copied to this machine, for as long as the context is open.

    Args:
        given: `output_dir` of a run, or a folder with an adapter.
        base: place of the base model, where it isn't the one that the run or the adapter names.

    Raises:
        UserError: when there is no finished adapter.
        ValueError: when it is of a kind that can't be merged.
    """
    where = locate(given)
    with tempfile.TemporaryDirectory(prefix="prefray-adapter-") as scratch:
        copy = Path(scratch, "adapter")
        if not holds_run(where):
            _refuse_what_is_no_adapter(given, where)
            yield _of_adapter(given, fetch(where, copy), where, base)
            return
        folder, state = finished_run(given, where)
        adapter = fetch(folder.model, copy)
        if not (adapter / ADAPTER_CONFIG).is_file():
            raise UserError(f"{given!r} trained all weights, so there is nothing to merge: its model is {folder.model}")
        yield _of_run(given, folder, state, adapter, base)


def _refuse_what_is_no_adapter(given: str, where: Location) -> None:
    if isinstance(where, Path) and where.is_file():
        raise UserError(f"{given!r} is a file; give the output_dir of a finished run, or a folder with {ADAPTER_CONFIG}")
    names = Folder(where).names()
    if ADAPTER_CONFIG in names:
        return
    if "config.json" in names:
        raise UserError(f"{given!r} holds a whole model, so there is nothing to merge")
    is_empty = "is empty" if not isinstance(where, Path) or where.is_dir() else "is not there"
    what = "holds no run and no adapter" if names else is_empty
    raise UserError(f"{given!r} {what}; give the output_dir of a finished run, or a folder with {ADAPTER_CONFIG}")


def _of_run(given: str, folder: RunFolder, state: dict[str, Any], adapter: Path, base: str | None) -> Source:
    cfg = parse_saved(folder.storage.read(CONFIG) or "", str(folder.config))
    prepared = open_store(Path(cfg.dataset_prepared_path, state["prepared"]))
    if base is not None:
        cfg = cfg.model_copy(update={"base_model": base})
    return Source(given, cfg, adapter, inside(folder.path, MERGED), state.get("base"), prepared)


def _of_adapter(given: str, adapter: Path, where: Location, base: str | None) -> Source:
    named = base or read_adapter_config(adapter).base_model_name_or_path
    if not named:
        raise UserError(f"{given!r}: {ADAPTER_CONFIG} doesn't say which base model the adapter belongs to; give it with --base")
    beside = None if is_uri(str(where)) else Path(where).with_name(f"{Path(where).name}-{MERGED}")
    return Source(given, as_config({"base_model": named, "rl": "dpo"}), adapter, beside)
