"""Leases: one process at a time writes a folder or a store; others wait for it, or are refused with its name."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.errors import RunFailed, UserError
from pipeline.io.holder import Holder, here, parse
from pipeline.io.lease_records import Found, Records, open_records
from pipeline.io.retry import STORAGE_ERRORS, waiting_for, with_retries
from pipeline.io.storage import Folder

__all__ = ["BEAT_S", "Holder", "Lease", "LeaseTaken", "held", "holder_of"]

BEAT_S = 10.0
"""Seconds between renewals, by which processes on other machines know that the holder is alive."""
POLL_S = 1.0
"""Seconds between two looks at another's lease."""
AGAIN_S = 0.05
"""Seconds until the next try, when another process came first."""
UNREADABLE = Holder(id="", validity=2.0)
"""Holder of what is no record: it may be being written, on storage where that is visible."""
_HELD: set[str] = set()
"""Ids of this process's leases."""


class LeaseTaken(UserError):
    """Another process holds the lease."""

    def __init__(self, folder: Folder, holder: Holder) -> None:
        self.holder = holder
        super().__init__(f"{str(folder.where)!r} is being written by {holder}; wait for its end or stop it")


class Lease:
    """A lease of this process."""

    def __init__(self, records: Records, me: Holder, version: str, where: object) -> None:
        self._records, self._me, self._version, self._where = records, me, version, where
        self._renewed_at, self._beat = _now(), 0
        self._lock = threading.Lock()
        self.is_lost = False
        """Whether another process has taken it over, or its record was deleted: for good, whatever the other one does."""
        self._lost_to: Holder | None = None

    def check(self) -> None:
        """Make sure that this process may still write; call it before anything that only one process may do.

        Raises:
            RunFailed: when the lease is lost.
            OSError: when storage has failed for minutes, so that it is unknown; some stores raise pyarrow.ArrowException.
        """
        if self._is_overdue:
            with_retries(self.renew, "the renewal of a lease")
        if self.is_lost:
            raise RunFailed(self.message())

    def message(self) -> str:
        """Return the message for a lost lease."""
        if self._lost_to is None:
            return f"the record of who writes {self._where} was deleted, by hand or by another process; nothing more is written"
        return (
            f"{self._where} was taken over by {self._lost_to} while this process gave no sign of life, and is written by it "
            "now; nothing more is"
        )

    def renew(self) -> None:
        """Renew the lease once, or find that it is lost. Raises errors of the storage."""
        with self._lock:
            if self.is_lost:
                return
            asked_at, self._beat = _now(), self._beat + 1
            version = self._records.renew(self._version, self._me.record(self._beat))
            if version is None:
                found, holder = _look(self._records)
                if found is None or holder is None or holder.id != self._me.id:
                    self._lost_to, self.is_lost = holder, True
                    return
                version = found.version  # an earlier renewal has succeeded, though its answer was lost
            self._version, self._renewed_at = version, asked_at

    def keep(self, ended: threading.Event) -> None:
        """Renew until the end; a renewal that fails is made up for by the next one."""
        while not self.is_lost and not ended.wait(BEAT_S):
            with suppress(*STORAGE_ERRORS):
                self.renew()

    def release(self) -> None:
        """Give the lease back; where storage fails, others take it over when this process has ended."""
        with suppress(*STORAGE_ERRORS):
            if self._is_overdue:
                self.renew()
            if not self.is_lost:
                self._records.remove(self._version)

    @property
    def _is_overdue(self) -> bool:
        # Half of the validity: what is written after this look takes its time, too.
        return not self.is_lost and _now() - self._renewed_at > self._me.validity / 2


@contextmanager
def held(folder: Folder, name: str, on_wait: Callable[[Holder], None] | None = None) -> Iterator[Lease]:
    """Hold a lease while the context is open; a thread renews it.

    A holder on this machine that has died is taken over at once; any other one after the time without renewals that its
    record says, as seen from here: clocks of different machines are never compared.

    Args:
        folder: where the lease's record lies; created if needed.
        name: file name of the record.
        on_wait: called once for every holder that is waited for. None: a living one is refused.

    Raises:
        LeaseTaken: without `on_wait`, while another process holds it.
        OSError: when the record can't be written; some stores raise pyarrow.ArrowException or NotImplementedError.
    """
    me = here()
    folder.create()
    records = open_records(folder, name)
    # Before the record: another thread that finds it must not take it for one that this process left behind.
    _HELD.add(me.id)
    try:
        lease = Lease(records, me, _claim(folder, records, me, on_wait), folder.where)
        ended = threading.Event()
        thread = threading.Thread(target=lease.keep, args=(ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            ended.set()
            thread.join()
            lease.release()
    finally:
        _HELD.discard(me.id)


def _claim(folder: Folder, records: Records, me: Holder, on_wait: Callable[[Holder], None] | None) -> str:
    """Write this process's record once no other process holds the lease; return its version."""
    watch = _Watch()
    while True:
        found, holder = watch.read(records)
        if found is None or holder is None:
            version = records.create(me.record(0))
        elif holder.id == me.id:
            return found.version  # written by a request whose answer was lost
        elif _has_ended(holder) or watch.has_expired(found, holder):
            version = records.take_over(found.version, me.record(0))
        else:
            watch.look(found, holder)
            _wait(folder, holder, watch, on_wait)
            continue
        if version is not None:
            return version
        time.sleep(AGAIN_S)


def _wait(folder: Folder, holder: Holder, watch: _Watch, on_wait: Callable[[Holder], None] | None) -> None:
    """Let some time pass before the next look, or raise LeaseTaken."""
    if on_wait is None:
        if holder.is_here or watch.has_seen_life:
            raise LeaseTaken(folder, holder)
        what = f"a sign of life of {holder}, which wrote {folder.where} last"
    else:
        if holder.id not in watch.announced:
            watch.announced.add(holder.id)
            on_wait(holder)
        what = f"{holder}, which does the same work in {folder.where}"
    with waiting_for(what):
        time.sleep(POLL_S)


class _Watch:
    """What is seen of another holder. Looks are counted, not seconds: this process may be suspended between two."""

    def __init__(self) -> None:
        self._seen: tuple[str, str] | None = None
        self._looks = 0
        self.has_seen_life = False
        """Whether a renewal was seen, or a new holder."""
        self.announced = {UNREADABLE.id}
        """Ids of holders that `on_wait` was called with."""

    def read(self, records: Records) -> tuple[Found | None, Holder | None]:
        """Read a record; storage that fails later than at the first time is waited for."""
        if self._seen is None:
            return _look(records)
        return with_retries(lambda: _look(records), "the look at a lease", self._start_again)

    def look(self, found: Found, holder: Holder) -> None:
        """Take note of a record that is held."""
        if self._seen == (holder.id, found.version):
            self._looks += 1
        else:
            self.has_seen_life = self._seen is not None
            self._seen, self._looks = (holder.id, found.version), 0

    def has_expired(self, found: Found, holder: Holder) -> bool:
        """Return whether this version was seen for longer than it is valid."""
        return self._seen == (holder.id, found.version) and self._looks * POLL_S >= holder.validity

    def _start_again(self) -> None:
        """Count from zero: while storage failed, the holder couldn't renew either."""
        self._looks = 0


def holder_of(folder: Folder, name: str) -> Holder | None:
    """Return the process that holds a lease; None where no process does, or where it is known to have died.

    Args:
        folder, name: as in `held`.
    """
    holder = _look(open_records(folder, name))[1]
    return None if holder is None or _has_ended(holder) else holder


def _look(records: Records) -> tuple[Found | None, Holder | None]:
    found = records.read()
    return found, None if found is None else parse(found.text) or UNREADABLE


def _has_ended(holder: Holder) -> bool:
    if holder.is_here and holder.process == os.getpid():
        return holder.id not in _HELD
    return holder.has_ended()


def _now() -> float:
    """Return seconds of a clock that keeps running while the machine is suspended, where there is one."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
