"""Records of leases: each change succeeds for one process alone, as far as the storage supports that."""

from __future__ import annotations

import configparser
import errno
import logging
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from pyarrow import fs

from pipeline.io.filesystems import S3_KEYS, store_options
from pipeline.io.storage import Folder

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["Found", "Records", "open_records"]

logger = logging.getLogger(__name__)

RACE_S = 1.0
"""Seconds after which it is decided, on storage without conditional writes, which of two processes has written last."""
NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
KEPT_OPEN = (".nfs", ".fuse_hidden")
"""Beginnings of the names under which network filesystems keep deleted files that are still open."""
LIMITS: dict[str, Any] = {
    "client_options": {"timeout": "10s", "connect_timeout": "5s", "allow_http": True},
    "retry_config": {"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
}


@dataclass(frozen=True)
class Found:
    """A record as it was read."""

    text: str
    version: str
    """Changes whenever the record does."""


class Records(Protocol):
    """The record of one lease. Methods that write it return its new version, None where another process came first."""

    def read(self) -> Found | None:
        """Read the record; None where there is none."""

    def create(self, text: str) -> str | None:
        """Write a record where there is none."""

    def take_over(self, version: str, text: str) -> str | None:
        """Replace this version of another process's record."""

    def renew(self, version: str, text: str) -> str | None:
        """Replace this version of one's own record."""

    def remove(self, version: str) -> None:
        """Delete the record if it is still this version."""


def open_records(folder: Folder, name: str) -> Records:
    """Return the record `name` of a folder, with conditional writes where the storage has them."""
    if isinstance(folder.filesystem, fs.LocalFileSystem):
        return LocalRecords(Path(folder.path, name))
    if (store := _conditional_store(folder)) is not None:
        records = ObjectRecords(store, f"{folder.path.partition('/')[2]}/{name}")
        try:
            if records.honours_conditions():
                return records
            reason = "the store ignores their conditions"
        except OSError as error:  # such as credentials that only pyarrow finds
            reason = next(iter(str(error).splitlines()), "")
        logger.warning("no conditional writes to %s: %s; two processes that start at once wait for each other", name, reason)
    return PlainRecords(folder, name)


class LocalRecords:
    """A record on a filesystem, also a shared one: a folder with one file, whose name is its version.

    A folder can be renamed onto an empty one only, and a file only while it exists. So one process alone creates, renews or
    takes over, without a lock of the filesystem.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Found | None:
        while True:
            try:
                versions = [name for name in os.listdir(self._path) if not name.startswith(KEPT_OPEN)]
                return Found((self._path / versions[0]).read_text(errors="replace"), versions[0]) if versions else None
            except NotADirectoryError:  # the file of an earlier version of prefray
                text = self._path.read_text(errors="replace")
                return Found(text, f"file {text}")
            except FileNotFoundError:
                # If it exists, it was renewed between the two calls.
                if not self._path.exists():
                    return None

    def create(self, text: str) -> str | None:
        version = f"{uuid4().hex}.0"
        staged = self._path.with_name(f".{self._path.name.lstrip('.')}-{version}")
        staged.mkdir()
        try:
            (staged / version).write_text(text)
            staged.rename(self._path)
        # No such file: a network filesystem has repeated a request that had succeeded.
        except (NotADirectoryError, FileNotFoundError):
            return None
        except OSError as error:
            if error.errno in NOT_EMPTY:
                return None
            raise
        finally:
            with suppress(OSError):
                (staged / version).unlink(missing_ok=True)
                staged.rmdir()
        return version

    def take_over(self, version: str, text: str) -> str | None:
        return self.create(text) if self._remove(version) else None

    def renew(self, version: str, text: str) -> str | None:
        """Rename the file; its text stays, since the name shows the renewal."""
        base, _, count = version.rpartition(".")
        following = f"{base}.{int(count) + 1}"
        try:
            (self._path / version).rename(self._path / following)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return following

    def remove(self, version: str) -> None:
        if self._remove(version):
            with suppress(OSError):  # the next process has it, or has removed it
                self._path.rmdir()

    def _remove(self, version: str) -> bool:
        try:
            (self._path if version.startswith("file ") else self._path / version).unlink()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        return True


class ObjectRecords:
    """A record in an object store whose writes may have conditions."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key = store, key.lstrip("/")

    def honours_conditions(self) -> bool:
        """Return whether a write whose condition is false fails. Raises OSError when the store can't be written."""
        probe = ObjectRecords(self._store, f"{self._key}.{uuid4().hex}")
        if (version := probe.take_over('"none"', "")) is None:
            return True
        probe.remove(version)
        return False

    def read(self) -> Found | None:
        import obstore
        from obstore.exceptions import BaseError

        try:
            found = obstore.get(self._store, self._key)
            return Found(bytes(found.bytes()).decode(errors="replace"), str(found.meta["e_tag"]))
        except FileNotFoundError:
            return None
        except BaseError as error:
            raise OSError(str(error)) from error

    def create(self, text: str) -> str | None:
        return self._put(text, "create")

    def take_over(self, version: str, text: str) -> str | None:
        return self._put(text, {"e_tag": version})

    renew = take_over

    def remove(self, version: str) -> None:
        """Delete it; between the two requests another process could take it over, but not before the lease has expired."""
        import obstore
        from obstore.exceptions import BaseError

        found = self.read()
        if found is not None and found.version == version:
            try:
                obstore.delete(self._store, self._key)
            except BaseError as error:
                raise OSError(str(error)) from error

    def _put(self, text: str, mode: Any) -> str | None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            return str(obstore.put(self._store, self._key, text.encode(), mode=mode)["e_tag"])
        except (AlreadyExistsError, PreconditionError, FileNotFoundError):
            return None
        except BaseError as error:
            raise OSError(str(error)) from error


class PlainRecords:
    """A record on storage without conditional writes: of two that write at once, the last one has it."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name

    def read(self) -> Found | None:
        try:
            text = self._folder.read(self._name)
        except FileNotFoundError:  # deleted between the two requests
            return None
        return None if text is None else Found(text, text)

    def create(self, text: str) -> str | None:
        return self._write(text) if self.read() is None else None

    def take_over(self, version: str, text: str) -> str | None:
        return self._write(text) if self._is(version) else None

    def renew(self, version: str, text: str) -> str | None:
        if not self._is(version):
            return None
        self._folder.write(self._name, text)
        return text

    def remove(self, version: str) -> None:
        if self._is(version):
            self._folder.delete(self._name)

    def _is(self, version: str) -> bool:
        return (found := self.read()) is not None and found.version == version

    def _write(self, text: str) -> str | None:
        self._folder.write(self._name, text)
        time.sleep(RACE_S)
        return text if self._is(text) else None


def _conditional_store(folder: Folder) -> ObjectStore | None:
    """Open a folder's bucket for conditional writes; None for stores other than S3, and for assumed roles."""
    if not isinstance(folder.resolved, fs.S3FileSystem):
        return None
    from obstore.store import S3Store

    options = store_options(folder.resolved)
    if options["role_arn"]:
        return None
    # obstore calls its options by the names of the variables.
    keys = {variable.lower(): options[option] for option, variable in S3_KEYS.items()}
    config = {
        "region": options["region"] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
        "endpoint": _endpoint(options),
        "skip_signature": options["anonymous"],
        "virtual_hosted_style_request": options["force_virtual_addressing"],
        **(keys if options["access_key"] else _profile_keys()),
    }
    given: Any = {name: value for name, value in config.items() if value}
    return S3Store(folder.path.partition("/")[0], config=given, **LIMITS)


def _endpoint(options: dict[str, Any]) -> str:
    endpoint = options["endpoint_override"] or os.environ.get("AWS_ENDPOINT_URL", "")
    return endpoint if "://" in endpoint or not endpoint else f"{options['scheme']}://{endpoint}"


def _profile_keys() -> dict[str, str]:
    """Return the keys of AWS_PROFILE in `~/.aws/credentials`, unless the environment holds keys."""
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    file, profile = configparser.ConfigParser(interpolation=None), os.environ.get("AWS_PROFILE", "default")
    try:
        file.read(os.path.expanduser(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")))
    except configparser.Error:
        return {}
    return {name: file.get(profile, name, fallback="") for name in map(str.lower, S3_KEYS.values())}
