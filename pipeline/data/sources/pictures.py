"""Reading of the pictures that rows name or hold."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from pipeline.data.sources.download import HTTP, download
from pipeline.data.sources.filesystem import NETWORK_ERRORS, is_uri
from pipeline.data.transforms.base import RowError
from pipeline.errors import UserError
from pipeline.io.storage import fail_fast, inside, resolve, without_scheme
from pipeline.secrets import redact_text

__all__ = ["HostFailed", "PictureReader", "is_data_url"]

MAX_BYTES = 256 << 20
"""Bytes of a picture's file; far above those of any that fits Pillow's limit of pixels."""
SHOWN = 120
"""Characters of a path in a message."""
THREADS = 8
"""Pictures that are fetched at once."""
DATA = re.compile("data:", re.IGNORECASE)
NO_CONNECTION = ("curlCode", "NETWORK_CONNECTION", "google::cloud::Status(UNAVAILABLE")
"""Texts of pyarrow's errors of S3 and Google's storage that can't be reached: it has no types for them."""


class HostFailed(RowError):
    """A host that can't be reached; `host` is its name."""

    def __init__(self, host: str, message: str) -> None:
        super().__init__(message)
        self.host = host


def is_data_url(value: Any) -> bool:
    """Return whether a picture is given as a data URL."""
    return isinstance(value, str) and DATA.match(value) is not None


class PictureReader:
    """Reads pictures, those of other machines ahead of their turn. A host that has failed once isn't asked again.

    Args:
        folder: to which relative paths are relative, a path or a URI; None for a dataset of the hub.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._failed: dict[str, str] = {}
        self._locks: dict[str, Lock] = {}
        self._known = set[str]()
        self._ahead: dict[str, Future[bytes]] = {}

    def read_ahead(self, values: Iterable[Any]) -> None:
        """Begin to fetch those of a row's pictures that are on other machines; `forget` them once the row is done."""
        for value in map(_given, values):
            if isinstance(value, str) and value not in self._ahead and self._is_remote(value):
                self._ahead[value] = self._pool.submit(self._from_file, value)

    def forget(self, values: Iterable[Any]) -> None:
        """Drop what was fetched ahead of a row."""
        for value in map(_given, values):
            if isinstance(value, str):
                self._ahead.pop(value, None)

    def read(self, value: Any) -> bytes:
        """Return the bytes of a picture: bytes, a mapping of `bytes` or `path`, a path, a URI or a data URL.

        Raises:
            RowError: for another value, or a file that can't be read; HostFailed if the host is to blame.
        """
        value = _given(value)
        if isinstance(value, bytes | bytearray | memoryview):
            data = bytes(value)
        elif not isinstance(value, str) or not value.strip():
            raise RowError(f"a picture must be a path, a URI, bytes, or a mapping of bytes and path, got {_described(value)}")
        elif is_data_url(value):
            data = _decoded(value)
        else:
            data = self._ahead[value].result() if value in self._ahead else self._from_file(value)
        if not data:
            where = f": {_shown(value)}" if isinstance(value, str) and not is_data_url(value) else ""
            raise RowError(f"a picture is empty{where}")
        return data

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")

    def _is_remote(self, given: str) -> bool:
        # A `file://` of another machine is an error, which `read` says.
        relative = not os.path.isabs(os.path.expanduser(given)) and self._folder is not None and is_uri(self._folder)
        return not is_data_url(given) and (relative or (is_uri(given) and given[:7].lower() != "file://"))

    def _from_file(self, given: str) -> bytes:
        shown = _shown(given)
        try:
            location = self._located(given, shown)
            host = urlsplit(location).netloc.rpartition("@")[2] if is_uri(location) else ""
        except UserError as error:
            raise RowError(f"a picture can't be read: {error}") from error
        except ValueError as error:  # of a URI that is none
            raise RowError(f"a picture can't be read: {shown}: {error}") from error
        if host and host not in self._known:
            # One thread alone, so that a host which doesn't answer is asked once.
            with self._locks.setdefault(host, Lock()):
                if host not in self._known:
                    return self._fetched(location, host, shown)
        return self._fetched(location, host, shown)

    def _fetched(self, location: str, host: str, shown: str) -> bytes:
        if host in self._failed:
            raise HostFailed(host, self._failed[host])
        try:
            data = download(location, MAX_BYTES) if location.startswith(HTTP) else _opened(location)
        except (UserError, *NETWORK_ERRORS, *_errors_of_clients()) as error:
            if not host or not _is_unreachable(error):
                self._known.add(host)
                raise RowError(f"a picture can't be read: {shown}: {_reason(error)}") from error
            self._failed[host] = f"a picture can't be fetched: {host} can't be reached ({_reason(error)})"
            raise HostFailed(host, self._failed[host]) from error
        self._known.add(host)
        if len(data) > MAX_BYTES:
            raise RowError(f"a picture has more than {MAX_BYTES >> 20} MiB: {shown}")
        return data

    def _located(self, given: str, shown: str) -> str:
        path = os.path.expanduser(without_scheme(given))
        if is_uri(path) or os.path.isabs(path):
            return path
        if self._folder is None:
            raise RowError(f"a picture has a relative path, {shown!r}, which names no file in a dataset of the hub")
        return inside(self._folder, path) if is_uri(self._folder) else os.path.join(self._folder, path)


def _shown(path: str) -> str:
    return redact_text(path if len(path) <= SHOWN else f"{path[:SHOWN]}...").encode(errors="backslashreplace").decode()


def _given(value: Any) -> Any:
    given = value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _opened(location: str) -> bytes:
    filesystem, path = resolve(location)
    with fail_fast(filesystem).open_input_stream(path, compression=None) as stream:
        return stream.read(MAX_BYTES + 1)


def _errors_of_clients() -> tuple[type[Exception], ...]:
    """Return the errors of the clients that download; Python asks for them only when there is one."""
    import aiohttp
    import httpx

    return aiohttp.ClientError, httpx.HTTPError


def _is_unreachable(error: Exception) -> bool:
    # Here, as in `_errors_of_clients`: every process of a trial imports this module, and most read no pictures.
    import aiohttp
    import httpx

    types = (ConnectionError, TimeoutError, aiohttp.ClientConnectionError, httpx.ConnectError, httpx.ConnectTimeout)
    return isinstance(error, types) or any(part in str(error) for part in NO_CONNECTION)


def _decoded(url: str) -> bytes:
    """Decode a data URL. Raises RowError."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RowError(f"a picture's data URL must hold base64 (data:image/png;base64,...), got {head[:40]!r}")
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"a picture's data URL is no base64: {error}") from error


def _described(value: Any) -> str:
    return "nothing" if value is None or isinstance(value, str | bytes) else type(value).__name__


def _reason(error: BaseException) -> str:
    reason = str(error).strip() or type(error).__name__
    return redact_text(reason.splitlines()[0])[:200]
