"""Where files lie: local paths, and URIs of whatever pyarrow or fsspec knows."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from pipeline.config.secrets import redact_text
from pipeline.errors import UserError
from pipeline.patience import STORAGE_ERRORS, waiting_for

__all__ = ["S3_VARIABLES", "Folder", "Location", "fetch", "inside", "is_uri", "locate", "reason", "resolve"]

Location = Path | str
"""A local path, or the text of a URI."""
T = TypeVar("T")
AnyLocation = TypeVar("AnyLocation", Path, str, Location)
HASTE = timedelta(seconds=20)
"""How long Google's client may try while a person waits for a command to start; its own limit is 15 minutes."""
S3_ATTEMPTS = 12
"""Two to three minutes of an S3 that doesn't answer."""
S3_KEYS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
S3_VARIABLES = (*S3_KEYS.values(), "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
"""Where S3 and its keys are found."""
S3_HINT = (
    "S3's keys are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, the region from AWS_DEFAULT_REGION, "
    "an endpoint that isn't Amazon's from AWS_ENDPOINT_URL"
)


def is_uri(where: str) -> bool:
    """Whether it has a scheme."""
    return "://" in where


def locate(where: str) -> Location:
    """A local path, `file://` or not, made absolute; another URI as it is."""
    if where.startswith("file://"):
        where = fs.FileSystem.from_uri(where)[1]
    return where if is_uri(where) else Path(os.path.expanduser(where)).absolute()


def resolve(where: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a path or URI, and the path in it; what pyarrow doesn't know goes to fsspec.

    Raises:
        UserError: when neither knows the scheme, or the package for it is missing.
        OSError: when finding out already needs a network that doesn't answer.
    """
    if not is_uri(where):
        return fs.LocalFileSystem(), where
    try:
        return fs.FileSystem.from_uri(where)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    try:
        import fsspec

        # What another process has written since the last look must be seen.
        filesystem, path = fsspec.core.url_to_fs(where, use_listings_cache=False)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"cannot open {where!r}: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def inside(where: AnyLocation, name: str) -> AnyLocation:
    """The location of something in a folder; a URI keeps its query."""
    if isinstance(where, Path):
        return where / name
    base, mark, query = where.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def _told(operation: Callable[..., T]) -> Callable[..., T]:
    """Of a `Folder`: while it lasts, the command can say what it waits for."""

    @wraps(operation)
    def run(folder: Folder, *arguments: Any) -> T:
        with waiting_for(f"storage, at {redact_text(str(folder.where))}"):
            return operation(folder, *arguments)

    return run


class Folder:
    """A folder by its location, whether it exists or not; the operations are a run's."""

    def __init__(self, where: Location) -> None:
        self.where = where
        self.resolved, path = resolve(str(where))
        self.filesystem, self.path = _hasty(self.resolved), path.rstrip("/")

    @_told
    def names(self) -> list[str]:
        """Names of what is in it."""
        return [info.base_name for info in self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))]

    @_told
    def has_folder(self, name: str) -> bool:
        """Whether it has a folder of that name."""
        return self.filesystem.get_file_info(f"{self.path}/{name}").type == fs.FileType.Directory

    @_told
    def read(self, name: str) -> str | None:
        """A file's text; None where there is none."""
        path = f"{self.path}/{name}"
        if self.filesystem.get_file_info(path).type != fs.FileType.File:
            return None
        with self.filesystem.open_input_stream(path) as file:
            return file.read().decode("utf-8")

    def read_json(self, name: str) -> Any:
        """What a file of JSON holds; None where there is none.

        Raises:
            UserError: when it is broken.
        """
        text = self.read(name)
        try:
            return None if text is None else json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{inside(self.where, name)} is broken: {error}; put a whole one there, or give another folder"
            ) from error

    @_told
    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, so that nobody finds half of it: object stores show no file before it is whole."""
        path, data = f"{self.path}/{name}", content.encode("utf-8") if isinstance(content, str) else content
        if not isinstance(self.filesystem, fs.LocalFileSystem):
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
            return
        partial = f"{self.path}/.{name}.partial"
        try:
            with self.filesystem.open_output_stream(partial) as file:
                file.write(data)
            self.filesystem.move(partial, path)
        finally:
            with contextlib.suppress(OSError):
                os.remove(partial)  # what is left after a failure, which would take the rest of a full disk

    @_told
    def create(self) -> None:
        """Make it, and the folders that it is in."""
        self.filesystem.create_dir(self.path, recursive=True)

    @_told
    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it is there."""
        path = f"{self.path}/{name}"
        found = self.filesystem.get_file_info(path).type
        if found == fs.FileType.Directory:
            self.filesystem.delete_dir(path)
        elif found != fs.FileType.NotFound:
            self.filesystem.delete_file(path)

    def remove_if_empty(self) -> None:
        """Delete a folder on disk that has nothing in it; stores of objects have no empty folders."""
        if isinstance(self.filesystem, fs.LocalFileSystem) and os.path.isdir(self.path) and not os.listdir(self.path):
            os.rmdir(self.path)

    def carried(self) -> Folder:
        """The same folder, as it can be sent to workers."""
        other = copy.copy(self)
        other.filesystem = other.resolved = self.for_other_processes()
        return other

    def for_other_processes(self) -> fs.FileSystem:
        """The filesystem as workers are to have it: with time to wait, and the keys that this process was given."""
        if not isinstance(self.resolved, fs.S3FileSystem):
            return self.resolved
        options = _options(self.resolved)
        given = options["access_key"] or options["anonymous"] or options["role_arn"]
        if not given and os.environ.get("AWS_ACCESS_KEY_ID"):
            options |= {option: os.environ.get(name) for option, name in S3_KEYS.items()}
        options["region"] = options["region"] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")
        return PatientS3(**options)


def fetch(where: Location, copy: Path) -> Path:
    """A folder on this machine: itself where it is here, else its copy, which is there whole or not at all.

    Raises:
        UserError: when it can't be read.
    """
    if isinstance(where, Path):
        return where
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{copy.name}-", dir=copy.parent))
        try:
            source = Folder(where)
            filesystems = {"source_filesystem": source.filesystem, "destination_filesystem": fs.LocalFileSystem()}
            fs.copy_files(source.path, str(partial), **filesystems, use_threads=False)
            with contextlib.suppress(OSError):  # another process has brought it
                partial.rename(copy)
        except STORAGE_ERRORS as error:
            raise UserError(f"{where} can't be fetched: {reason(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return copy


class PatientS3(fs.S3FileSystem):
    """S3 that tries for minutes; pyarrow's own forgets how often to try when it goes to another process."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS))

    def __reduce__(self) -> tuple[Any, ...]:
        reduced: Any = super().__reduce__()
        return _patient_s3, reduced[1]


def _patient_s3(options: dict[str, Any]) -> PatientS3:
    return PatientS3(**options)


def _options(filesystem: fs.FileSystem) -> dict[str, Any]:
    """The arguments that make one of pyarrow's filesystems again, as it hands them to other processes."""
    reduced: Any = filesystem.__reduce__()
    return dict(reduced[1][0])


def _hasty(filesystem: fs.FileSystem) -> fs.FileSystem:
    """The filesystem for a person who waits: what is wrong is said soon."""
    if isinstance(filesystem, fs.GcsFileSystem):
        options = _options(filesystem)
        return fs.GcsFileSystem(**{**options, "retry_time_limit": options["retry_time_limit"] or HASTE})
    return filesystem


def reason(error: BaseException) -> str:
    """What storage says is wrong, in a line, with what to look at."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    line = next(iter(str(error).splitlines()), "") or "it can't be written"
    line = re.sub(r"\s*\(Request ID: .*?\)", "", line)
    is_s3 = "AWS Error" in line and "NO_SUCH_BUCKET" not in line
    return f"{line} ({S3_HINT})" if is_s3 else line
