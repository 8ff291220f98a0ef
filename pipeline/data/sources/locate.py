"""Resolution of an entry of `datasets:` to its files and their formats."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import pyarrow.fs as pafs

from pipeline.data.row_kinds import SourceFormat
from pipeline.data.sources.filesystem import NETWORK_ERRORS, File, is_uri, list_files, local_path
from pipeline.data.sources.splits import files_of_split
from pipeline.errors import UserError
from pipeline.io.first_answer import check_answer
from pipeline.io.storage import reason
from pipeline.secrets import redact_text

__all__ = ["EXTENSIONS", "FORMATS", "Located", "format_of", "locate"]

FORMATS: tuple[str, ...] = get_args(SourceFormat)
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
COMPRESSED = (".gz", ".bz2", ".zst", ".zstd", ".xz")
METADATA_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Located:
    """One file: its location (a path or URI), its name in messages and in `source`, its format.

    `rows_at` is the ijson prefix of the rows of JSON that isn't one per line: `item` in an array, `NAME.item` in a list of an
    object, "" for a sequence of objects. `sniff` detects it, and compression and encoding (None: UTF-8).
    """

    location: str
    name: str
    format: str
    split: str = "train"
    compression: str | None = None
    encoding: str | None = None
    rows_at: str = "item"

    @property
    def is_packed(self) -> bool:
        """Whether its rows can't be read from a byte offset."""
        return self.compression is not None or self.encoding is not None


def locate(dataset: Mapping[str, Any]) -> list[Located] | None:
    """Find the files of a dataset, in order; returns None when its path is an id on the Hugging Face hub.

    Raises:
        UserError: for a path that does not exist, a folder without data, an unknown format, a missing split.
    """
    files = _find(dataset)
    split = dataset.get("split") or "train"
    # Files that a folder's card or names assign to a split have it in `Located.split`; all others are `train`.
    if files and split.split("[")[0] not in ("train", files[0].split):
        raise UserError(f"split: got {split!r}, but files of {dataset['path']!r} have one split, 'train'")
    return files


def _find(dataset: Mapping[str, Any]) -> list[Located] | None:
    path, data_files = str(dataset["path"]), _as_list(dataset.get("data_files"))
    # The form of `load_dataset("json", data_files=...)`; a file or folder of that name takes precedence.
    if path in FORMATS and data_files and not os.path.exists(path):
        wanted = dataset.get("ds_type") or path
        return [_located(file, file, wanted) for pattern in data_files for file in _matches(pattern)]
    location = local_path(path)
    # A name may contain brackets, so an existing path is no pattern.
    if not is_uri(location) and glob.has_magic(location) and not os.path.exists(location):
        return [_located(file, file, dataset.get("ds_type")) for file in _matches(path, "path")]
    kind = _kind(location, path)
    if kind == pafs.FileType.Directory:
        return _in_folder(location, path, dataset, data_files)
    if kind == pafs.FileType.File:
        return [_located(location, path, dataset.get("ds_type"))]
    # A name with a known extension is a file that is missing, though a hub id may look the same.
    if not is_uri(path) and HUB_ID.fullmatch(path) and format_of(path) is None:
        return None
    raise UserError(f"path: no such file or folder: {path!r} (looked for {location})")


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _kind(location: str, path: str) -> pafs.FileType:
    try:
        file = File(location)
        check_answer(location, file.filesystem, file.path)
        return file.info().type
    except NETWORK_ERRORS as error:
        raise UserError(f"path: cannot reach {path!r}: {reason(error)}") from error


def _matches(pattern: str, key: str = "data_files") -> list[str]:
    """Return the local files that match a pattern, or the one file that it names."""
    location = local_path(pattern)
    is_pattern = not is_uri(location) and glob.has_magic(location) and not os.path.exists(location)
    files = sorted(glob.glob(location, recursive=True)) if is_pattern else [location]
    if not files or _kind(files[0], pattern) != pafs.FileType.File:
        raise UserError(f"{key}: no such file: {pattern!r} (looked for {location})")
    return files


def _in_folder(location: str, path: str, dataset: Mapping[str, Any], data_files: list[str]) -> list[Located]:
    inside, wanted = list_files(location), dataset.get("ds_type")
    # Before the search by extension, which would find the Arrow files in alphabetical order, and of all splits.
    if not data_files and (saved := _saved_files(inside, path, dataset.get("split") or "train")) is not None:
        return saved
    if data_files:
        names: list[str] = []
        for pattern in data_files:
            matching = [name for name in inside if fnmatch.fnmatch(name, pattern) and name not in names]
            if not matching:
                raise UserError(f"data_files: {pattern!r} matches no file in {path!r}")
            names += matching
    else:
        names = [name for name in inside if _is_data(name) and format_of(name) in ([wanted] if wanted else FORMATS)]
    if not names:
        raise UserError(f"path: the folder {path!r} holds no {wanted or 'data'} files (known formats: {', '.join(FORMATS)})")
    # For messages and `source`, without a query, which may hold credentials.
    folder = path.split("?")[0].rstrip("/") if is_uri(path) else path.rstrip("/")
    split = "train"
    if not data_files:
        card = _read_text(inside["README.md"]) if "README.md" in inside else ""
        split, names = files_of_split(path, names, card, dataset.get("name"), dataset.get("split"))
    return [_located(inside[name], f"{folder}/{name}", wanted, split) for name in names]


def _is_data(name: str) -> bool:
    """Return whether a file of a folder may be data: neither hidden nor metadata that `datasets` writes."""
    return not any(part.startswith((".", "__")) for part in name.split("/")) and os.path.basename(name) not in METADATA_FILES


def _saved_files(inside: dict[str, str], path: str, split: str) -> list[Located] | None:
    """Return the Arrow files of a `datasets.save_to_disk` folder, in the order of its state; None for another folder."""
    folder = ""
    if "dataset_dict.json" in inside:
        splits = _read_json(inside["dataset_dict.json"])["splits"]
        folder = split.split("[")[0]
        if folder not in splits:
            raise UserError(f"split: {path!r} has no split {folder!r}; it has: {', '.join(splits)}")
        folder += "/"
    if f"{folder}state.json" not in inside:
        return None
    files = [entry["filename"] for entry in _read_json(inside[f"{folder}state.json"])["_data_files"]]
    return [
        Located(inside[folder + file], f"{path.rstrip('/')}/{folder}{file}", "arrow", split=folder.rstrip("/") or "train")
        for file in files
    ]


def _read_json(location: str) -> Any:
    return json.loads(_read_text(location))


def _read_text(location: str) -> str:
    file = File(location)
    with file.filesystem.open_input_stream(file.path) as stream:
        return stream.read().decode(errors="replace")


def format_of(name: str) -> str | None:
    """Return the format that the ending of a file's name stands for; None for an unknown one."""
    # Of `rows.jsonl.gz` the inner extension counts; the compression itself is detected by `sniff`.
    stem, extension = os.path.splitext((name.split("?")[0] if is_uri(name) else name).lower())
    return EXTENSIONS.get(os.path.splitext(stem)[1] if extension in COMPRESSED else extension)


def _located(location: str, name: str, wanted: str | None, split: str = "train") -> Located:
    if wanted is not None and wanted not in FORMATS:
        raise UserError(f"ds_type: must be one of {', '.join(FORMATS)}, got {wanted!r}")
    format = wanted or format_of(name)
    if format is None:
        raise UserError(f"path: cannot tell the format of {name!r}; set ds_type to one of {', '.join(FORMATS)}")
    # The name is stored with each row; the location keeps what is needed to open it.
    return Located(location, redact_text(name), format, split)
