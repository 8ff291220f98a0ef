"""Where a merged model goes: a folder that appears when it is whole, or the URI of one."""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import RunFailed, UserError
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, Location, reason
from pipeline.runs.checkpoints import store
from pipeline.runs.export import COMPLETING

__all__ = ["check_free", "staged"]


def check_free(where: Location) -> None:
    """Raise UserError when the destination exists, or can't be reached."""
    try:
        taken = where.exists() if isinstance(where, Path) else Folder(where).names()
    except STORAGE_ERRORS as error:
        raise UserError(f"--output: {str(where)!r} can't be reached: {reason(error)}") from error
    if taken:
        raise UserError(f"--output: {str(where)!r} exists; give another folder, or delete it")


@contextmanager
def staged(where: Location, needed: int) -> Iterator[Path]:
    """Give a folder to write a model to, which goes to its place at the end, and is deleted if the context ends otherwise.

    Args:
        needed: bytes of the model.

    Raises:
        UserError: when there is no room for it, or another merge writes there.
        RunFailed: when the disk or the store fails while it is written.
    """
    with _sigterm_as_exception(), _scratch(where) as folder:
        room = shutil.disk_usage(folder).free
        if needed > room:
            raise UserError(
                f"--output: the merged model takes {_gib(needed)}, and {str(folder.parent)!r} has room for {_gib(room)}; "
                "give another place, or a smaller --dtype"
            )
        try:
            yield folder
            if isinstance(where, Path):
                # Within one filesystem, so the model appears at once or not at all.
                folder.rename(where)
            else:
                target = Folder(where)
                # Object stores can't rename: the file without which no library loads the model comes last.
                store(folder, target.filesystem, target.path, last=COMPLETING)
        except STORAGE_ERRORS as error:
            raise RunFailed(f"{str(where)!r} can't be written, and nothing of it is left: {reason(error)}") from error


@contextmanager
def _scratch(where: Location) -> Iterator[Path]:
    if not isinstance(where, Path):
        with tempfile.TemporaryDirectory(prefix="prefray-merged-") as scratch:
            yield Path(scratch)
        return
    # Beside the destination: a rename from another disk would be a copy.
    folder = where.with_name(f".{where.name}.partial")
    if folder.exists():
        raise UserError(f"--output: {str(folder)!r} is there: another merge writes it, or was killed; then delete it")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output: {str(where)!r} can't be written: {reason(error)}") from error
    try:
        yield folder
    finally:
        # After a successful merge it was renamed, and nothing is there.
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Let SIGTERM end this as Ctrl-C does, so that what was begun is deleted; signals reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SystemExit unwinds the contexts; SIGTERM's default would end the process at once.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    try:
        yield
    finally:
        with suppress(TypeError):  # a handler that wasn't Python's can't be put back
            signal.signal(signal.SIGTERM, before)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
