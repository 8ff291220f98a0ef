"""Access to files at local paths and URIs."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.io.storage import inside, is_uri, resolve, without_scheme

__all__ = [
    "File",
    "content_identity",
    "folder_of",
    "is_uri",
    "list_files",
    "local_path",
    "open_bytes",
    "open_seekable",
    "resolve",
]

CHUNK = 8 << 20
NETWORK_ERRORS = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, ValueError)


class File:
    """A filesystem and a path in it."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.filesystem, self.path = resolve(location)

    def info(self) -> pafs.FileInfo:
        return self.filesystem.get_file_info(self.path)


def local_path(path: str) -> str:
    """Make a local path absolute, since tasks run in other folders; URIs other than `file://` are returned unchanged."""
    path = without_scheme(path)
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def folder_of(location: str) -> str:
    """Return the folder of a file, a path or a URI."""
    if is_uri(location):
        return location.partition("?")[0].rpartition("/")[0]
    return os.path.dirname(os.path.abspath(location))


def list_files(location: str) -> dict[str, str]:
    """List the files under a folder, sorted: name within the folder -> path or URI, as `location` is."""
    folder = File(location)
    root = folder.path.rstrip("/")
    infos = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    names = sorted(info.path.removeprefix(root).lstrip("/") for info in infos if info.type == pafs.FileType.File)
    # Joined to `location`, not taken from the filesystem, whose paths lack the scheme.
    if not is_uri(location):
        return {name: f"{location.rstrip('/')}/{name}" for name in names}
    is_fsspec = isinstance(folder.filesystem, pafs.PyFileSystem)  # which doesn't decode percent escapes
    return {name: inside(location, name if is_fsspec else quote(name)) for name in names}


@contextmanager
def open_bytes(location: str, compression: str | None = None, encoding: str | None = None) -> Iterator[IO[bytes]]:
    """Open a file as a stream of bytes, decompressed (gzip, bz2, zstd, xz), and converted from `encoding` to UTF-8.

    Raises:
        NETWORK_ERRORS: (when opened or read) for a file that can't be reached, is cut off, or isn't what it should be.
    """
    file = File(location)
    # pyarrow has no xz. None also switches off its own detection by extension: `sniff` has read the first bytes.
    by_arrow = None if compression == "xz" else compression
    with file.filesystem.open_input_stream(file.path, compression=by_arrow, buffer_size=1 << 20) as stream:
        unpacked: Any = lzma.LZMAFile(stream) if compression == "xz" else stream  # noqa: SIM115 - the stream is closed
        yield io.BufferedReader(_AsUtf8(unpacked, encoding)) if encoding else unpacked


class _AsUtf8(io.RawIOBase):
    """Text of another encoding, read as UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        # newline="": line ends within cells and strings stay as they are.
        self._text = io.TextIOWrapper(io.BufferedReader(stream), encoding=encoding, newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        # A character takes four bytes at most, so these fit into the buffer.
        read = self._text.read(max(len(buffer) // 4, 1)).encode()
        buffer[: len(read)] = read
        return len(read)


@contextmanager
def open_seekable(location: str, compression: str | None = None) -> Iterator[Any]:
    """Open a file for random access; a compressed one is decompressed to a temporary file first. Raises as `open_bytes`."""
    file = File(location)
    if compression is None:
        if isinstance(file.filesystem, pafs.LocalFileSystem):
            # Mapped: batches refer to the file's pages instead of copies in memory.
            with pa.memory_map(file.path) as source:
                yield source
            return
        with file.filesystem.open_input_file(file.path) as source:
            yield source
        return
    with tempfile.NamedTemporaryFile(prefix="prefray-") as spool:
        with open_bytes(location, compression) as stream:
            while chunk := stream.read(CHUNK):
                spool.write(chunk)
        # The map opens the file by its name, and wouldn't see what is still in the buffer.
        spool.flush()
        with pa.memory_map(spool.name) as source:
            yield source


def content_identity(location: str) -> str:
    """Return an identity of a remote file's content: size with modification time or etag; else a hash of the bytes."""
    file = File(location)
    info = file.info()
    # Object stores give the time of the last write; to read the object only to hash it would download it twice.
    if info.mtime_ns:
        return f"{info.size}:{info.mtime_ns}"
    if isinstance(file.filesystem, pafs.PyFileSystem):
        details = file.filesystem.handler.fs.info(file.path)
        # fsspec's filesystems (https:// among them) have no time of modification, but mostly an etag.
        if etag := details.get("ETag") or details.get("etag"):
            return f"{info.size}:{etag}"
    digest = hashlib.sha256()
    with open_bytes(location) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
