"""Storage of files: local paths, and URIs of any scheme that pyarrow or fsspec supports."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from pyarrow import fs

from pipeline.errors import UserError
from pipeline.io.atomic import write_bytes
from pipeline.io.digests import damage, size_difference, written
from pipeline.io.filesystems import S3_HINT, S3_VARIABLES, fail_fast, for_other_processes, is_uri, resolve, retrying_s3
from pipeline.io.first_answer import check_answer
from pipeline.io.retry import waiting_for
from pipeline.io.tables import decoded, encoded, names_of
from pipeline.secrets import redact_text

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "S3_VARIABLES",
    "Folder",
    "Location",
    "fail_fast",
    "inside",
    "is_uri",
    "locate",
    "reason",
    "resolve",
    "without_scheme",
]

Location = Path | str
"""A local path, or a URI as text."""
T = TypeVar("T")
AnyLocation = TypeVar("AnyLocation", Path, str, Location)
FILE = "file://"
MEANINGS = {
    "curlCode: 28,": "it doesn't answer in time",
    "HTTP status 301": "the bucket is in another region",
    "AuthorizationHeaderMalformed": "the bucket is in another region",
    "REQUEST_TIME_TOO_SKEWED": "this machine's clock differs from the store's",
}
"""Part of an error of S3's client -> what it means."""
SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
FEW_SLASHES = re.compile("^(s3|gs|gcs|abfss?|az|hdfs|https?|file):(?!//)", re.IGNORECASE)
_retrying_s3 = retrying_s3
"""Its name in the saved states of sweeps."""


def without_scheme(location: str) -> str:
    """Return the path of a `file://` URI: unchanged where it exists, else with its escapes decoded; others with their scheme in
    lower case, as it means the same in any.

    Raises:
        UserError: when the URI names another machine, or has fewer than two slashes.
    """
    location = SCHEME.sub(lambda scheme: scheme[0].lower(), location)
    if FEW_SLASHES.match(location) and not os.path.exists(location):
        slashes = "one slash" if location.partition(":")[2].startswith("/") else "no slash"
        raise UserError(f"{location!r} has {slashes} after its scheme; a URI has two: s3://bucket/folder")
    if not location.startswith(FILE):
        return location
    path = location.removeprefix(FILE)
    if not path.startswith("/"):
        raise UserError(
            f"{location!r} names a machine, {path.partition('/')[0]!r}; a path on this one has three slashes: file:///..."
        )
    # A file's own name may hold "%20".
    return path if os.path.exists(path) else unquote(path)


def locate(location: str) -> Location:
    """Make a local path, `file://` or not, absolute; return other URIs unchanged.

    Raises:
        UserError: for an empty one, for a `file://` of another machine, and for a URI with fewer than two slashes.
    """
    if not location.strip():
        raise UserError(f"must name a folder, got {location!r}")
    location = without_scheme(location)
    return location if is_uri(location) else Path(os.path.expanduser(location)).absolute()


def inside(location: AnyLocation, name: str) -> AnyLocation:
    """Return the location of `name` in a folder; a URI keeps its query."""
    if isinstance(location, Path):
        return location / name
    base, mark, query = location.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def _reports_waiting(operation: Callable[..., T]) -> Callable[..., T]:
    """Register a `Folder`'s operation as waited for while it runs."""

    @wraps(operation)
    def run(folder: Folder, *arguments: Any) -> T:
        with waiting_for(f"storage, at {redact_text(str(folder.where))}"):
            if folder.is_new:
                check_answer(str(folder.where), folder.filesystem, folder.path)
                folder.is_new = False
            return operation(folder, *arguments)

    return run


class Folder:
    """A local or remote folder, which may not exist yet."""

    is_new = False
    """Whether it was opened by this process, and not asked for anything yet."""

    def __init__(self, where: Location) -> None:
        self.where = where
        self.resolved, path = resolve(str(where))
        # `resolved` keeps the store's long retries, for workers.
        self.filesystem, self.path = fail_fast(self.resolved), path.rstrip("/")
        self.is_new = not isinstance(self.resolved, fs.LocalFileSystem)

    @_reports_waiting
    def names(self) -> list[str]:
        """Return the names of its files and folders."""
        return [info.base_name for info in self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))]

    @_reports_waiting
    def has_folder(self, name: str) -> bool:
        """Return whether it has a folder of that name."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.Directory

    @_reports_waiting
    def read(self, name: str) -> str | None:
        """Read a file's text; None where there is no file."""
        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as file:
            return file.read().decode("utf-8")

    def read_json(self, name: str) -> Any:
        """Read a JSON file; None where there is no file.

        Raises:
            UserError: when it is no valid JSON.
        """
        text = self.read(name)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{inside(self.where, name)} is broken: {error}; put a whole one there, or give another folder"
            ) from error

    @_reports_waiting
    def write(self, name: str, content: str | bytes) -> None:
        """Write a file atomically; object stores show no file before it is complete."""
        path, data = f"{self.path}/{name}", content.encode("utf-8") if isinstance(content, str) else content
        # An object store shows a file when its stream is closed.
        if not isinstance(self.filesystem, fs.LocalFileSystem):
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
            return
        partial = str(Path(path).with_name(f".{Path(path).name}.partial"))
        try:
            with self.filesystem.open_output_stream(partial) as file:
                file.write(data)
            self.filesystem.move(partial, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(partial)  # remains after a failure, and would keep a full disk full

    @_reports_waiting
    def create(self) -> None:
        """Create the folder and its parents."""
        self.filesystem.create_dir(self.path, recursive=True)

    @_reports_waiting
    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it exists."""
        path = f"{self.path}/{name}"
        kind = self.filesystem.get_file_info(path).type
        if kind == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif kind != fs.FileType.NotFound:
            self.filesystem.delete_file(path)

    def remove_if_empty(self) -> None:
        """Delete the folder if it is local and empty; object stores have no empty folders."""
        if isinstance(self.filesystem, fs.LocalFileSystem) and os.path.isdir(self.path) and not os.listdir(self.path):
            os.rmdir(self.path)

    def subfolder(self, name: str) -> Folder:
        """Return the folder of that name in it, which may not exist yet, with the same keys and retries."""
        other = self._copy()
        other.where, other.path = inside(self.where, name), f"{self.path}/{name}"
        return other

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @_reports_waiting
    def exists(self, name: str) -> bool:
        """Return whether it has a file of that name."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.File

    @_reports_waiting
    def size(self, name: str) -> int | None:
        """Return a file's bytes; None where there is no file."""
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        return info.size if info.type == fs.FileType.File else None

    @_reports_waiting
    def modified(self, name: str) -> int | None:
        """Return when a file was written, in ns of an unspecified clock, 0 if that isn't known; None where there is no file."""
        info = self.filesystem.get_file_info(f"{self.path}/{name}")
        return (info.mtime_ns or 0) if info.type == fs.FileType.File else None

    @_reports_waiting
    def files(self, prefix: str = "") -> dict[str, int]:
        """Return name -> bytes of all files below its folder `prefix`, by one listing; the names begin with `prefix`."""
        selector = fs.FileSelector(f"{self.path}/{prefix}".rstrip("/"), recursive=True, allow_not_found=True)
        found = [info for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File]
        return {info.path.removeprefix(f"{self.path}/"): info.size for info in found}

    @_reports_waiting
    def read_bytes(self, name: str) -> bytes:
        """Read a file. Raises FileNotFoundError."""
        # Not as a stream, which makes a request of every 256 KiB.
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return file.read()

    @_reports_waiting
    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read Parquet, of a remote file only the parts with these columns; checksums of pages are compared.

        Raises:
            FileNotFoundError: when there is no file.
            OSError, pyarrow.ArrowException: when it is damaged.
        """
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            # All of a remote file by one request; of some columns, only their ranges.
            return decoded(file if self.is_local or columns else file.read(), columns)

    @_reports_waiting
    def column_names(self, name: str) -> list[str]:
        """Return the names of a Parquet file's columns. Raises as `read_table`."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return names_of(file)

    @_reports_waiting
    def write_bytes(self, name: str, data: bytes) -> dict[str, Any]:
        """Write a file atomically, with the folders above it; return a manifest's fields for it, `bytes` and `sha256`."""
        if self.is_local:
            write_bytes(data, Path(self.path, name))
        else:
            with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
                file.write(data)
        return written(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write indented JSON as `write_bytes`. Raises TypeError for a value that JSON doesn't have."""
        self.write_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_table(self, name: str, table: pa.Table, checksums: bool = False) -> dict[str, Any]:
        """Write Parquet as `write_bytes`: the same bytes for the same table.

        Args:
            checksums: add checksums of pages, for files that no manifest lists yet.
        """
        return self.write_bytes(name, encoded(table, checksums))

    def damage(self, entry: dict[str, Any], sizes: dict[str, int] | None = None) -> str | None:
        """Return how a file differs from its entry in a manifest, in a phrase; None where it is intact.

        Args:
            sizes: what `files` returned, with which a remote file's size is compared; local files are read.
        """
        if self.is_local:
            return damage(Path(self.path, entry["file"]), entry)
        return size_difference((self.files() if sizes is None else sizes).get(entry["file"]), entry)

    def carried(self) -> Folder:
        """Return a copy of this folder that can be sent to workers, with long retries."""
        other = self._copy()
        other.filesystem = other.resolved = self.for_other_processes()
        return other

    def _copy(self) -> Folder:
        other = object.__new__(Folder)
        vars(other).update(vars(self))
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Where it is sent to, another environment has other keys, or none.
        long = self.for_other_processes()
        return {**vars(self), "filesystem": long, "resolved": long, "is_new": False}

    def for_other_processes(self) -> fs.FileSystem:
        """Return the filesystem for workers: with long retries, and this process's keys."""
        return for_other_processes(self.resolved)


def reason(error: BaseException) -> str:
    """Return a storage error's reason in one line, with a hint."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    line = next(iter(str(error).splitlines()), "") or "it can't be written"
    line = re.sub(r"\s*\(Request ID: .*?\)", "", line)
    if meaning := next((meaning for part, meaning in MEANINGS.items() if part in line), None):
        line = f"{meaning}: {line}"
    is_s3 = "AWS Error" in line and "NO_SUCH_BUCKET" not in line
    return f"{line} ({S3_HINT})" if is_s3 else line
