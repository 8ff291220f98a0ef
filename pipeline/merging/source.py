"""What is merged: the adapter of a run, or one in a folder, and the base model that it was trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pyarrow import fs

from pipeline.config import parse_config
from pipeline.data.store import Prepared, open_store
from pipeline.errors import UserError
from pipeline.patience import STORAGE_ERRORS
from pipeline.storage import Location, inside, is_uri, locate, reason
from pipeline.training.folder import CONFIG, MODEL, RunFolder
from strategies.config import as_config
from strategies.merging.adapter import ADAPTER_CONFIG, read_adapter_config

__all__ = ["Source", "open_source"]

SWEEP = "sweep.json"
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
    try:
        folder = RunFolder(locate(given))
        names = folder.storage.names()
        state = folder.state()
    except STORAGE_ERRORS as error:
        raise UserError(f"{given!r} can't be read: {reason(error)}") from error
    if state is None:
        _refuse_what_is_no_adapter(given, names)
    elif folder.finished_steps() is None:
        raise UserError(
            f"{given!r} holds a run that hasn't finished, so it has no model yet; "
            f"`prefray train {inside(folder.path, CONFIG)} --resume` finishes it"
        )
    with tempfile.TemporaryDirectory(prefix="prefray-adapter-") as scratch:
        where = folder.path if state is None else folder.model
        adapter = _here(where, folder, Path(scratch))
        if state is None:
            yield _of_adapter(given, adapter, where, base)
        elif not (adapter / ADAPTER_CONFIG).is_file():
            raise UserError(
                f"{given!r} holds a run that trained all weights, so there is nothing to merge: its model is {where}"
            )
        else:
            yield _of_run(given, folder, state, adapter, base)


def _refuse_what_is_no_adapter(given: str, names: list[str]) -> None:
    if ADAPTER_CONFIG in names:
        return
    if SWEEP in names:
        raise UserError(
            f"{given!r} holds a sweep; give the folder of one of its trials, such as {given.rstrip('/')}/trials/000"
        )
    if "config.json" in names:
        raise UserError(f"{given!r} holds a whole model, so there is nothing to merge")
    what = "holds no run and no adapter" if names else "is not there, or is empty"
    raise UserError(f"{given!r} {what}; give the output_dir of a finished run, or a folder with {ADAPTER_CONFIG}")


def _here(where: Location, folder: RunFolder, scratch: Path) -> Path:
    """The adapter's folder on this machine."""
    if isinstance(where, Path):
        return where
    source = folder.storage.path if where == folder.path else f"{folder.storage.path}/{MODEL}"
    copies = {"source_filesystem": folder.storage.filesystem, "destination_filesystem": fs.LocalFileSystem()}
    try:
        fs.copy_files(source, str(scratch), **copies, use_threads=False)
    except STORAGE_ERRORS as error:
        raise UserError(f"{str(where)!r} can't be read: {reason(error)}") from error
    return scratch


def _of_run(given: str, folder: RunFolder, state: dict[str, Any], adapter: Path, base: str | None) -> Source:
    text = folder.storage.read(CONFIG)
    if text is None:
        raise UserError(f"{given!r} lacks {CONFIG}, which says what its adapter was trained on; give {folder.model} and --base")
    cfg = parse_config(yaml.safe_load(text), origin=str(folder.config))
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
