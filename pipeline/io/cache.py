"""The node's cache: folders that its processes share, brought once from wherever they are kept.

An entry is complete or absent. One process fills it while others wait; every process that uses it holds a shared lock on it
for as long as it lives, so that what is in use is never removed. Locks are the kernel's, of the node's own disk: they end with
their process, however it ends.

    {key}/                  a complete entry, with a listing of its files
    {key}.use, {key}.fill   its locks
    {key}.{bytes}.partial/  one that is being filled, and the bytes that are reserved for it
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.io.file_locks import lock, locked
from pipeline.io.retry import waiting_for

if TYPE_CHECKING:
    from cluster.config import RayConfig

__all__ = ["CACHE_VARIABLE", "Item", "NodeCache"]

CACHE_VARIABLE = "PREFRAY_CACHE"
"""Environment variable of a node with the path of its cache, where the recipe names none."""
DEFAULT = "~/.cache/prefray"
ELSEWHERE = f"ray.cache_dir (or {CACHE_VARIABLE}) to another folder on a disk of the node"
FREE_SHARE = 0.8
"""Part of the disk's free bytes that a cache without a size may fill, what it holds already counted as free."""
LISTING = ".prefray.json"
MOST_SYNCED = 1000
"""Files of an entry that are waited for until they are on the disk: more are pictures, whose zeros can't be decoded."""
_IN_USE: dict[Path, int] = {}
"""Entry -> descriptor of its shared lock, which is held until the process ends."""


@dataclass(frozen=True)
class Item:
    """What an entry holds, and how it gets there."""

    key: str
    """Its name, which says exactly what is in it: letters, digits, `-`, `_`."""
    what: str
    """Names it in messages, in the plural: "the training rows"."""
    size: Callable[[], int]
    """Returns the bytes that it will take, roughly; called only if it must be filled. May raise UserError."""
    fill: Callable[[Path], None]
    """Writes its files into an empty folder; may raise OSError for that folder's disk, and UserError for anything else."""


@dataclass(frozen=True)
class NodeCache:
    """Entries under `root` that take at most `limit` bytes together; without a limit, most of what its disk has free."""

    root: Path
    limit: int | None = None

    @classmethod
    def of(cls, keys: RayConfig) -> NodeCache:
        """Return the cache of this node, by the recipe's `ray.cache_dir` and `ray.cache_size`."""
        root = keys.cache_dir or os.environ.get(CACHE_VARIABLE) or DEFAULT
        return cls(Path(os.path.expanduser(root)), keys.cache_bytes)

    def check_path(self) -> None:
        """Raise UserError for a relative path: driver and workers run in different folders, and Ray deletes its own."""
        if not self.root.is_absolute():
            raise UserError(
                f"ray.cache_dir, or {CACHE_VARIABLE}: must be an absolute path on a disk of the node, or one in ~, got "
                f"{str(self.root)!r}"
            )

    def problem(self) -> str | None:
        """Return why no entry can be made here; None where it can."""
        if not self.root.is_absolute():
            return f"{str(self.root)!r} is no absolute path"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            os.close(lock(self.root / ".lock", fcntl.LOCK_EX))
        except OSError as error:
            return error.strerror or str(error)
        return None

    def check(self) -> None:
        """Raise UserError where no entry can be made here."""
        self.check_path()
        if (problem := self.problem()) is not None:
            raise UserError(f"{self._unwritable(problem)} set {ELSEWHERE}")

    def check_room(self, items: Iterable[Item]) -> None:
        """Raise UserError where entries don't fit together, beside what this process uses: one message for all of them."""
        wanted = {self.root / item.key: item for item in items}
        absent = {folder: item for folder, item in wanted.items() if not _is_intact(folder)}
        if not absent:
            return
        self.check()
        size = sum(item.size() for item in absent.values())
        used = {*(wanted.keys() - absent.keys()), *(folder for folder in _IN_USE if folder.parent == self.root)}
        kept = sum(_listing(folder).get("bytes", 0) for folder in used)
        if size + kept > self._most():
            raise UserError(self._full(", ".join(item.what for item in absent.values()), size, kept))

    def check_limit(self, what: str, size: int) -> None:
        """Raise UserError where entries are larger than the cache of any node may be; `what` names them, in the plural."""
        if self.limit is not None and size > self.limit:
            raise UserError(self._too_large(f"{what} take about {_shown(size)} of each node's cache", size))

    def get(self, item: Item, beat: Callable[[], None] = lambda: None) -> Path:
        """Return the folder of an entry, filled if it is absent or damaged; it stays until this process ends.

        Args:
            item: the entry.
            beat: called again and again while another process fills it.

        Raises:
            UserError: when it doesn't fit, the cache can't be written, or as `check_path` and `item.fill`.
        """
        assert re.fullmatch(r"[\w-]+", item.key), item.key
        self.check_path()
        folder = self.root / item.key
        if folder in _IN_USE and _is_intact(folder):
            return folder
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            while not self._use(folder):
                with waiting_for(f"another process, which brings {item.what} into {self.root}"):
                    filling = lock(_beside(folder, "fill"), fcntl.LOCK_EX, beat)
                try:
                    if not _is_intact(folder):
                        self._fill(folder, item)
                finally:
                    os.close(filling)
        except OSError as error:
            raise UserError(f"{self._unwritable(error.strerror or str(error))}{_room_for(item)} set {ELSEWHERE}") from error
        return folder

    def _use(self, folder: Path) -> bool:
        """Take the shared lock of an intact entry for good; return whether there is one."""
        descriptor = lock(_beside(folder, "use"), fcntl.LOCK_SH)
        if not _is_intact(folder):
            os.close(descriptor)
            return False
        os.utime(folder / LISTING)
        _IN_USE[folder] = descriptor
        return True

    def _fill(self, folder: Path, item: Item) -> None:
        """Fill an entry whose `fill` lock is held. Raises OSError and UserError, and leaves nothing then."""
        partial = self._reserve(folder, item)
        try:
            item.fill(partial)
            paths = [path for path in partial.rglob("*") if path.is_file()]
            # A machine that loses its power may find a file of the right size, and zeros in it.
            for path in paths[:MOST_SYNCED]:
                _sync(path)
            files = {str(path.relative_to(partial)): _state(path) for path in paths}
            listing = {"bytes": sum(size for size, _ in files.values()), "files": files}
            (partial / LISTING).write_text(json.dumps(listing))
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _reserve(self, folder: Path, item: Item) -> Path:
        """Make room for an entry, which the least recently used ones give; return the empty folder that reserves it."""
        size = item.size()
        with locked(self.root / ".lock"):
            # A damaged one may be mapped by others still, whose pages outlive the names of its files.
            _remove(folder)
            for partial in self._partials():
                self._remove_leftover(partial, folder)
            evictable = self._least_recent()
            while not self._fits(size):
                if not any(map(_evict, evictable)):
                    raise UserError(self._full(item.what, size, self._taken()))
            partial = _beside(folder, f"{size}.partial")
            partial.mkdir()
        return partial

    def _remove_leftover(self, partial: Path, own: Path) -> None:
        """Remove what a process that was killed had begun to fill or to remove."""
        key = partial.name.split(".")[0]
        # Its own is held by this process, which would wait for itself.
        if key == own.name:
            shutil.rmtree(partial)
            return
        with suppress(BlockingIOError), locked(self.root / f"{key}.fill", fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(partial)

    def _partials(self) -> list[Path]:
        # By their whole names: the folder may hold what is somebody else's.
        return [path for path in self.root.iterdir() if re.fullmatch(r"[\w-]+\.\d+\.partial", path.name)]

    def _entries(self) -> list[Path]:
        return [listing.parent for listing in self.root.glob(f"*/{LISTING}") if "." not in listing.parent.name]

    def _least_recent(self) -> Iterator[Path]:
        return iter(sorted(self._entries(), key=lambda entry: (entry / LISTING).stat().st_mtime_ns))

    def _taken(self) -> int:
        """Return the bytes of all entries, and those reserved for what is being filled."""
        reserved = sum(int(partial.name.split(".")[1]) for partial in self._partials())
        return reserved + sum(_listing(entry).get("bytes", 0) for entry in self._entries())

    def _most(self) -> int:
        """Return the bytes that all entries together may take."""
        return self.limit if self.limit is not None else int(FREE_SHARE * (shutil.disk_usage(self.root).free + self._taken()))

    def _fits(self, size: int) -> bool:
        return self._taken() + size <= self._most() and size <= shutil.disk_usage(self.root).free

    def _full(self, what: str, size: int, taken: int) -> str:
        """Return the message for what doesn't fit beside what is in use."""
        free = shutil.disk_usage(self.root).free
        beside = f" beside {_shown(taken)} that are in use" if taken else ""
        needs = f"{what} take about {_shown(size)} of the node's cache {self.root}{beside}"
        if self.limit is not None and size + taken > self.limit:
            return self._too_large(needs, size + taken)
        return (
            f"ray.cache_dir: {needs}, and its disk has {_shown(free)} free, of which a fifth is left to others unless "
            f"ray.cache_size says otherwise; make room, or set {ELSEWHERE} with more room"
        )

    def _too_large(self, needs: str, size: int) -> str:
        assert self.limit is not None
        return f"ray.cache_size: {needs}, and it may hold {_shown(self.limit)}; set {_shown(size, up=True)} or more"

    def _unwritable(self, problem: str) -> str:
        return f"ray.cache_dir: the node's cache {self.root} can't be written: {problem};"


def _room_for(item: Item) -> str:
    try:
        return f" {item.what} take about {_shown(item.size())} of it;"
    except (UserError, OSError):
        return ""


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _listing(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / LISTING).read_bytes())
    except (OSError, ValueError):
        return {}


def _is_intact(folder: Path) -> bool:
    """Return whether an entry is there and its files have the sizes and times that they had when it was filled."""
    files = _listing(folder).get("files")
    try:
        return files is not None and all(_state(folder / name) == state for name, state in files.items())
    except OSError:
        return False


def _evict(folder: Path) -> bool:
    """Remove an entry and its locks unless a process holds one; return whether it did."""
    files = [_beside(folder, "use"), _beside(folder, "fill")]
    try:
        with locked(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB), locked(files[1], fcntl.LOCK_EX | fcntl.LOCK_NB):
            _remove(folder)
            for file in files:
                file.unlink()
    except BlockingIOError:
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove an entry, whole at once: who is killed meanwhile leaves what the next process removes."""
    if folder.exists():
        removed = _beside(folder, "0.partial")
        folder.rename(removed)
        shutil.rmtree(removed)


def _shown(size: int, up: bool = False) -> str:
    """Return a size as `ray.cache_size` takes it; rounded up, so that it is enough, where `up`."""
    unit, step = next((pair for pair in (("TB", 10**12), ("GB", 10**9)) if size >= pair[1]), ("MB", 10**6))
    return f"{math.ceil(10 * size / step) / 10 if up else size / step:.1f}{unit}"
