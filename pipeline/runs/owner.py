"""Ownership of a run's or sweep's folder: one process writes it at a time; errors of others name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from pipeline.errors import UserError
from pipeline.io.lease import Holder, Lease, LeaseTaken, held, holder_of
from pipeline.io.retry import STORAGE_ERRORS
from pipeline.io.storage import Folder, reason
from pipeline.ui.display import clock_time

__all__ = ["OWNER", "Ownership", "owned", "owner_of"]

OWNER = ".owner.json"
Ownership = Lease


@contextmanager
def owned(folder: Folder) -> Iterator[Ownership]:
    """Own a folder while the context is open, or until the ownership is lost.

    Raises:
        UserError: when another process owns the folder, naming it, or when it can't be written.
    """
    with ExitStack() as stack:
        # Called last, since callbacks run in reverse order: the record is gone by then.
        stack.callback(_remove_if_empty, folder)
        try:
            ownership = stack.enter_context(held(folder, OWNER))
        except LeaseTaken as taken:
            since = f" since {clock_time(taken.holder.since)}" if taken.holder.since else ""
            raise UserError(
                f"output_dir: {str(folder.where)!r} is being written by {taken.holder}{since}; wait for its end or stop it, or "
                "give another output_dir"
            ) from None
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(folder.where)!r} can't be written: {reason(error)}") from error
        yield ownership


def owner_of(folder: Folder) -> Holder | None:
    """Return the process that owns a folder; None if it is known that none does."""
    return holder_of(folder, OWNER)


def _remove_if_empty(folder: Folder) -> None:
    with suppress(OSError):  # another process has written to it
        folder.remove_if_empty()
