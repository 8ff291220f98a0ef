"""Where a merged model goes: a folder that appears when it is whole, or the URI of one."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.errors import RunFailed, UserError
from pipeline.patience import STORAGE_ERRORS
from pipeline.storage import Folder, Location, reason
from pipeline.training.artifacts import COMPLETING
from pipeline.training.checkpoints import store

__all__ = ["Output"]


class Output:
    """The place of a merged model.

    Raises:
        UserError: when something is there already, or it can't be reached.
    """

    def __init__(self, where: Location) -> None:
        self.where = where
        try:
            self._folder = Folder(where)
            taken = where.exists() if isinstance(where, Path) else self._folder.names()
        except STORAGE_ERRORS as error:
            raise UserError(f"--output: {str(where)!r} can't be reached: {reason(error)}") from error
        if taken:
            raise UserError(f"--output: {str(where)!r} exists; give another folder, or delete it")

    @contextmanager
    def staging(self, needed: int) -> Iterator[tuple[Path, Callable[[], None]]]:
        """A folder to write the model to, and what puts it in place; whatever wasn't, is deleted at the end.

        Args:
            needed: bytes of the model.

        Raises:
            UserError: when there is no room for it, or another merge writes there.
            RunFailed: when the disk or the store fails while it is written.
        """
        with _ends_by_exception(), self._scratch() as folder:
            room = shutil.disk_usage(folder).free
            if needed > room:
                raise UserError(
                    f"--output: the merged model takes {_gib(needed)}, and {str(folder.parent)!r} has room for {_gib(room)}; "
                    "give another place, or a smaller --dtype"
                )
            try:
                yield folder, lambda: self._put(folder)
            except STORAGE_ERRORS as error:
                raise RunFailed(f"{str(self.where)!r} can't be written, and nothing of it is left: {reason(error)}") from error

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        if not isinstance(self.where, Path):
            with tempfile.TemporaryDirectory(prefix="prefray-merged-") as scratch:
                yield Path(scratch)
            return
        folder = self.where.with_name(f".{self.where.name}.partial")
        if folder.exists():
            raise UserError(f"--output: {str(folder)!r} is there: another merge writes it, or was killed; then delete it")
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--output: {str(self.where)!r} can't be written: {reason(error)}") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _put(self, folder: Path) -> None:
        if isinstance(self.where, Path):
            folder.rename(self.where)
        else:
            store(folder, self._folder.filesystem, self._folder.path, last=COMPLETING)


@contextmanager
def _ends_by_exception() -> Iterator[None]:
    """Let SIGTERM end this as Ctrl-C does, so that what was begun is deleted; signals reach the main thread alone."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        with suppress(TypeError):  # a handler that wasn't Python's can't be put back
            signal.signal(signal.SIGTERM, before)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
