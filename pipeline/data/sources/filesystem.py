"""Opens local paths and URIs alike."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.storage import inside, is_uri, resolve

__all__ = ["File", "content_identity", "is_uri", "list_files", "local_path", "open_bytes", "open_seekable", "resolve"]

CHUNK = 8 << 20
NETWORK_ERRORS = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, ValueError)


class File:
    """A filesystem and a path in it."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.filesystem, self.path = resolve(where)

    def info(self) -> pafs.FileInfo:
        return self.filesystem.get_file_info(self.path)


def local_path(path: str) -> str:
    """A local path, absolute, since tasks run in other folders; URIs (but `file://`) as they are."""
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    return path if is_uri(path) else os.path.abspath(os.path.expanduser(path))


def list_files(where: str) -> dict[str, str]:
    """The files under a folder, sorted: name within the folder -> path or URI like `where`."""
    folder = File(where)
    root = folder.path.rstrip("/")
    found = folder.filesystem.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    names = sorted(info.path.removeprefix(root).lstrip("/") for info in found if info.type == pafs.FileType.File)
    return {name: inside(where, name) if is_uri(where) else f"{where.rstrip('/')}/{name}" for name in names}


@contextmanager
def open_bytes(where: str, compression: str | None = None, encoding: str | None = None) -> Iterator[IO[bytes]]:
    """The bytes of a file from its start, decompressed (gzip, bz2, zstd, xz); text of another encoding as UTF-8."""
    file = File(where)
    by_arrow = None if compression == "xz" else compression
    with file.filesystem.open_input_stream(file.path, compression=by_arrow, buffer_size=1 << 20) as stream:
        unpacked: Any = lzma.LZMAFile(stream) if compression == "xz" else stream  # noqa: SIM115 - the stream is closed
        yield io.BufferedReader(_AsUtf8(unpacked, encoding)) if encoding else unpacked


class _AsUtf8(io.RawIOBase):
    """Text of another encoding, read as UTF-8."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._text = io.TextIOWrapper(io.BufferedReader(stream), encoding=encoding, newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As many characters as surely fit, each of four bytes at most."""
        read = self._text.read(max(len(buffer) // 4, 1)).encode()
        buffer[: len(read)] = read
        return len(read)


@contextmanager
def open_seekable(where: str, compression: str | None = None) -> Iterator[Any]:
    """A file that can be read from any place; a compressed one is unpacked to a temporary file first."""
    file = File(where)
    if compression is None:
        if isinstance(file.filesystem, pafs.LocalFileSystem):
            with pa.memory_map(file.path) as source:
                yield source
            return
        with file.filesystem.open_input_file(file.path) as source:
            yield source
        return
    with tempfile.NamedTemporaryFile(prefix="prefray-") as spool:
        with open_bytes(where, compression) as stream:
            while chunk := stream.read(CHUNK):
                spool.write(chunk)
        spool.flush()
        with pa.memory_map(spool.name) as source:
            yield source


def content_identity(where: str) -> str:
    """What stands for a remote file's content: size with modification time or etag; else a hash of the bytes."""
    file = File(where)
    info = file.info()
    if info.mtime_ns:
        return f"{info.size}:{info.mtime_ns}"
    if isinstance(file.filesystem, pafs.PyFileSystem):
        details = file.filesystem.handler.fs.info(file.path)
        if etag := details.get("ETag") or details.get("etag"):
            return f"{info.size}:{etag}"
    digest = hashlib.sha256()
    with open_bytes(where) as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
