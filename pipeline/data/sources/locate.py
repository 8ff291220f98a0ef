"""Which files an entry of `datasets:` means, and what format they have."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs

from pipeline.config.secrets import redact_text
from pipeline.data.sources.filesystem import NETWORK_ERRORS, File, is_uri, list_files, local_path
from pipeline.errors import UserError

__all__ = ["FORMATS", "Located", "locate"]

FORMATS = ("jsonl", "json", "csv", "parquet", "arrow")
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Located:
    """One file: where it is, what it is called in messages and in `source`, its format."""

    where: str
    name: str
    format: str
    gzip: bool = False
    split: str = "train"


def locate(dataset: Mapping[str, Any]) -> list[Located] | None:
    """The files of a dataset in order, or None when its path is an id on the Hugging Face hub.

    Raises:
        UserError: for a path that does not exist, a folder without data, an unknown format, a split that isn't there.
    """
    files = _find(dataset)
    split = dataset.get("split") or "train"
    if files and split.split("[")[0] not in ("train", files[0].split):
        raise UserError(f"split: got {split!r}, but files of {dataset['path']!r} have one split, 'train'")
    return files


def _find(dataset: Mapping[str, Any]) -> list[Located] | None:
    path, data_files = str(dataset["path"]), _as_list(dataset.get("data_files"))
    if path in FORMATS and data_files and not os.path.exists(path):
        wanted = dataset.get("ds_type") or path
        return [_located(file, file, wanted) for pattern in data_files for file in _matches(pattern)]
    where = local_path(path)
    if not is_uri(where) and glob.has_magic(where) and not os.path.exists(where):
        return [_located(file, file, dataset.get("ds_type")) for file in _matches(path, "path")]
    kind = _kind(where, path)
    if kind == pafs.FileType.Directory:
        return _in_folder(where, path, dataset, data_files)
    if kind == pafs.FileType.File:
        return [_located(where, path, dataset.get("ds_type"))]
    if not is_uri(path) and HUB_ID.fullmatch(path) and _format(path) is None:
        return None
    raise UserError(f"path: no such file or folder: {path!r} (looked for {where})")


def _as_list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _kind(where: str, path: str) -> pafs.FileType:
    try:
        return File(where).info().type
    except NETWORK_ERRORS as error:
        raise UserError(f"path: cannot reach {path!r}: {error}") from error


def _matches(pattern: str, key: str = "data_files") -> list[str]:
    """Local files that match a pattern, or the one file that it names."""
    where = local_path(pattern)
    found = sorted(glob.glob(where, recursive=True)) if not is_uri(where) and glob.has_magic(where) else [where]
    if not found or _kind(found[0], pattern) != pafs.FileType.File:
        raise UserError(f"{key}: no such file: {pattern!r} (looked for {where})")
    return found


def _in_folder(where: str, path: str, dataset: Mapping[str, Any], data_files: list[str]) -> list[Located]:
    inside, wanted = list_files(where), dataset.get("ds_type")
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
        names = [name for name in inside if _format(name) in ([wanted] if wanted else FORMATS)]
    if not names:
        raise UserError(f"path: the folder {path!r} holds no {wanted or 'data'} files (known formats: {', '.join(FORMATS)})")
    folder = path.split("?")[0].rstrip("/") if is_uri(path) else path.rstrip("/")
    return [_located(inside[name], f"{folder}/{name}", wanted) for name in names]


def _saved_files(inside: dict[str, str], path: str, split: str) -> list[Located] | None:
    """The Arrow files of a `datasets.save_to_disk` folder, in the order that its state names them."""
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


def _read_json(where: str) -> Any:
    file = File(where)
    with file.filesystem.open_input_stream(file.path) as stream:
        return json.loads(stream.read())


def _format(name: str) -> str | None:
    name = name.split("?")[0].lower().removesuffix(".gz")
    return EXTENSIONS.get(os.path.splitext(name)[1])


def _located(where: str, name: str, wanted: str | None) -> Located:
    if wanted is not None and wanted not in FORMATS:
        raise UserError(f"ds_type: must be one of {', '.join(FORMATS)}, got {wanted!r}")
    format = wanted or _format(name)
    if format is None:
        raise UserError(f"path: cannot tell the format of {name!r}; set ds_type to one of {', '.join(FORMATS)}")
    return Located(where, redact_text(name), format, gzip=name.split("?")[0].lower().endswith(".gz"))
