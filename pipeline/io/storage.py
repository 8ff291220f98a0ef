"""Storage of files: local paths, and URIs of any scheme that pyarrow or fsspec supports."""

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
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS, waiting_for
from pipeline.io.storage_keys import hand_over, take
from pipeline.secrets import redact_text

__all__ = [
    "S3_VARIABLES",
    "Folder",
    "Location",
    "fail_fast",
    "fetch",
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
SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
INTERACTIVE_TIMEOUT = timedelta(seconds=20)
"""How long Google's client may retry while a user waits for a command to start, or a task for a picture; its default is 15
minutes."""
S3_ATTEMPTS = 12
"""Attempts of one request: two to three minutes of an S3 that doesn't answer."""
S3_KEYS = {
    "access_key": "AWS_ACCESS_KEY_ID",
    "secret_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}
S3_VARIABLES = (*S3_KEYS.values(), "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
"""Environment variables of S3: keys, region, endpoint."""
S3_HINT = (
    "S3's keys are read from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, the region from AWS_DEFAULT_REGION, "
    "an endpoint that isn't Amazon's from AWS_ENDPOINT_URL"
)


def is_uri(location: str) -> bool:
    """Return whether a location has a scheme."""
    return "://" in location


def without_scheme(location: str) -> str:
    """Return the path of a `file://` URI: unchanged where it exists, else with its escapes decoded; others with their scheme in
    lower case, as it means the same in any.

    Raises:
        UserError: when the URI names another machine.
    """
    location = SCHEME.sub(lambda scheme: scheme[0].lower(), location)
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
        UserError: for a `file://` of another machine.
    """
    location = without_scheme(location)
    return location if is_uri(location) else Path(os.path.expanduser(location)).absolute()


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """Return the pyarrow filesystem of a path or URI, and the path in it; schemes that pyarrow doesn't support go to fsspec.

    Special characters of a URI may be escaped or not.

    Raises:
        UserError: when neither supports the scheme, or the package for it is missing.
        OSError: when opening the filesystem needs a network that doesn't answer.
    """
    if not is_uri(location):
        return fs.LocalFileSystem(), location
    try:
        return fs.FileSystem.from_uri(_as_uri(location))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        pass
    try:
        import fsspec

        # Without a cache of listings: files that other processes have written meanwhile must be visible.
        filesystem, path = fsspec.core.url_to_fs(location, use_listings_cache=False)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"cannot open {location!r}: {error}") from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _as_uri(location: str) -> str:
    """Escape special characters of a URI's path: `#` begins no fragment, and existing escapes (`%20`) stay."""
    scheme, _, rest = location.partition("://")
    host, slash, path = rest.partition("/")
    path, mark, query = path.partition("?")
    path = quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", path), safe="/%:@!$&'()*+,;=~")
    return f"{scheme}://{host}{slash}{path}{mark}{query}"


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
            return operation(folder, *arguments)

    return run


class Folder:
    """A local or remote folder, which may not exist yet."""

    def __init__(self, where: Location) -> None:
        self.where = where
        self.resolved, path = resolve(str(where))
        # `resolved` keeps the store's long retries, for workers.
        self.filesystem, self.path = fail_fast(self.resolved), path.rstrip("/")

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
        partial = f"{self.path}/.{name}.partial"
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

    def carried(self) -> Folder:
        """Return a copy of this folder that can be sent to workers."""
        other = copy.copy(self)
        other.filesystem = other.resolved = self.for_other_processes()
        return other

    def for_other_processes(self) -> fs.FileSystem:
        """Return the filesystem for workers: with long retries, and this process's keys."""
        if not isinstance(self.resolved, fs.S3FileSystem):
            return self.resolved
        options = _options(self.resolved)
        # Keys in the URI, an anonymous or an assumed role are the user's choice; otherwise workers get this environment's.
        has_credentials = options["access_key"] or options["anonymous"] or options["role_arn"]
        if not has_credentials and os.environ.get("AWS_ACCESS_KEY_ID"):
            options |= {option: os.environ.get(name) for option, name in S3_KEYS.items()}
        options["region"] = options["region"] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION", "")
        return RetryingS3(**options)


def fetch(location: Location, copy: Path) -> Path:
    """Return a local folder itself; download a remote one atomically to `copy` unless that exists, and return `copy`.

    Raises:
        UserError: when it can't be read.
    """
    if isinstance(location, Path):
        return location
    if not copy.is_dir():
        copy.parent.mkdir(parents=True, exist_ok=True)
        # Beside the copy: a rename within one disk is atomic.
        partial = Path(tempfile.mkdtemp(prefix=f".{copy.name}-", dir=copy.parent))
        try:
            source = Folder(location)
            filesystems = {"source_filesystem": source.filesystem, "destination_filesystem": fs.LocalFileSystem()}
            fs.copy_files(source.path, str(partial), **filesystems, use_threads=False)
            try:
                partial.rename(copy)
            except OSError:
                if not copy.is_dir():  # if it is, another process has downloaded it
                    raise
        except STORAGE_ERRORS as error:
            raise UserError(f"{location} can't be fetched: {reason(error)}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return copy


class RetryingS3(fs.S3FileSystem):
    """S3 with retries for minutes; pyarrow's class loses its retry strategy when it is pickled.

    A pickle contains no keys, but the name by which other processes of this Ray find them.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS))

    def __reduce__(self) -> tuple[Any, ...]:
        # pyarrow's filesystems have no other way to read their options.
        options = _options(super())
        keys = {name: value for name in S3_KEYS if (value := options.pop(name, None))}
        return _retrying_s3, (options, hand_over(keys) if keys else None)


def _retrying_s3(options: dict[str, Any], name: str | None) -> RetryingS3:
    if name is None:
        return RetryingS3(**options)
    # A pickle of another Ray, whose keys are gone: use this process's.
    local = {option: os.environ[variable] for option, variable in S3_KEYS.items() if variable in os.environ}
    return RetryingS3(**options, **(take(name) or local))


def _options(filesystem: Any) -> dict[str, Any]:
    """Return the constructor arguments of a pyarrow filesystem, from its pickle."""
    reduced: Any = filesystem.__reduce__()
    return dict(reduced[1][0])


def fail_fast(filesystem: fs.FileSystem) -> fs.FileSystem:
    """Limit the retries of a filesystem, so that errors are reported soon."""
    if isinstance(filesystem, fs.GcsFileSystem):
        options = _options(filesystem)
        return fs.GcsFileSystem(**{**options, "retry_time_limit": options["retry_time_limit"] or INTERACTIVE_TIMEOUT})
    return filesystem


def reason(error: BaseException) -> str:
    """Return a storage error's reason in one line, with a hint."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    line = next(iter(str(error).splitlines()), "") or "it can't be written"
    line = re.sub(r"\s*\(Request ID: .*?\)", "", line)
    is_s3 = "AWS Error" in line and "NO_SUCH_BUCKET" not in line
    return f"{line} ({S3_HINT})" if is_s3 else line
