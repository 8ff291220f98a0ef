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
from pipeline.data.sources.splits import files_of_split
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
COMPRESSED = (".gz", ".bz2", ".zst", ".zstd", ".xz")
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Located:
    """One file: where it is, what it is called in messages and in `source`, its format.

    `rows_at` is where the rows of JSON that isn't one per line stand: `item` in an array, `NAME.item` in a list of an object,
    "" where each is an object of its own. `sniff` finds it, as it finds compression and encoding (None: UTF-8).
    """

    where: str
    name: str
    format: str
    split: str = "train"
    compression: str | None = None
    encoding: str | None = None
    rows_at: str = "item"

    @property
    def is_packed(self) -> bool:
        """Whether its bytes can't be read from any place."""
        return self.compression is not None or self.encoding is not None


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
        names = [name for name in inside if _is_data(name) and _format(name) in ([wanted] if wanted else FORMATS)]
    if not names:
        raise UserError(f"path: the folder {path!r} holds no {wanted or 'data'} files (known formats: {', '.join(FORMATS)})")
    folder = path.split("?")[0].rstrip("/") if is_uri(path) else path.rstrip("/")
    split = "train"
    if not data_files:
        card = _read_text(inside["README.md"]) if "README.md" in inside else ""
        split, names = files_of_split(path, names, card, dataset.get("name"), dataset.get("split"))
    return [_located(inside[name], f"{folder}/{name}", wanted, split) for name in names]


def _is_data(name: str) -> bool:
    """Whether a file of a folder may be data: not hidden, nor what `datasets` writes about data."""
    return not any(part.startswith((".", "__")) for part in name.split("/")) and os.path.basename(name) not in ABOUT


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
    return json.loads(_read_text(where))


def _read_text(where: str) -> str:
    file = File(where)
    with file.filesystem.open_input_stream(file.path) as stream:
        return stream.read().decode(errors="replace")


def _format(name: str) -> str | None:
    stem, extension = os.path.splitext(name.split("?")[0].lower())
    return EXTENSIONS.get(os.path.splitext(stem)[1] if extension in COMPRESSED else extension)


def _located(where: str, name: str, wanted: str | None, split: str = "train") -> Located:
    if wanted is not None and wanted not in FORMATS:
        raise UserError(f"ds_type: must be one of {', '.join(FORMATS)}, got {wanted!r}")
    format = wanted or _format(name)
    if format is None:
        raise UserError(f"path: cannot tell the format of {name!r}; set ds_type to one of {', '.join(FORMATS)}")
    return Located(where, redact_text(name), format, split)
