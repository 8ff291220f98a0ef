"""Ownership of a run's or sweep's folder: one process writes it at a time; errors of others name it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from filelock import FileLock, Timeout

from pipeline.errors import UserError
from pipeline.io.retry import STORAGE_ERRORS, waiting_for
from pipeline.io.storage import Folder, reason
from pipeline.ui.display import clock_time

__all__ = ["BEAT_S", "EXPIRY_S", "OWNER", "Ownership", "owned"]

OWNER, LOCK = ".owner.json", ".owner.lock"
BEAT_S = 10.0
"""Seconds between heartbeats, by which processes on other machines know that the owner is alive."""
EXPIRY_S = 60.0
"""Seconds without a heartbeat after which an owner on another machine counts as dead."""
SAME_START_S = 2.0
"""Tolerance when start times of a process are compared: the clock may have been adjusted."""
_OWN: set[str] = set()
"""Ids of this process's ownerships."""
RACE_S = 1.0
"""Seconds after which it is decided which of two processes that claimed a folder at once has written last."""


@dataclass
class Ownership:
    """This process's ownership of a folder."""

    is_lost: bool = False
    """Whether another process has taken it over, since heartbeats were missing."""

    def message(self, path: object) -> str:
        """Return the message for a lost folder."""
        return (
            f"{path} was taken over by another process while this one gave no sign of life, and is written by it now; nothing "
            "more is"
        )


@contextmanager
def owned(folder: Folder) -> Iterator[Ownership]:
    """Own a folder while the context is open, or until the ownership is lost.

    On the machine of a former owner, its process and (for local folders) a file lock show at once whether it is alive. On
    others, this waits for its heartbeats, for `EXPIRY_S` at most.

    Raises:
        UserError: when another process owns the folder, naming it, or when it can't be written.
    """
    me = _here()
    with ExitStack() as stack:
        try:
            folder.create()
            # Called last, since callbacks run in reverse order: the lock's file is gone by then.
            stack.callback(_remove_if_empty, folder)
            if isinstance(folder.where, Path):
                _lock(folder, stack)
            _claim(folder, me)
        except STORAGE_ERRORS as error:
            raise UserError(f"output_dir: {str(folder.where)!r} can't be written: {reason(error)}") from error
        _OWN.add(me["id"])
        stack.callback(_OWN.discard, me["id"])
        ended, ownership = threading.Event(), Ownership()
        thread = threading.Thread(target=_beat, args=(folder, me, ended, ownership), name="owner", daemon=True)
        thread.start()
        try:
            yield ownership
        finally:
            ended.set()
            thread.join()
            with suppress(*STORAGE_ERRORS):
                if (_owner(folder) or {}).get("id") == me["id"]:
                    folder.delete(OWNER)


def _remove_if_empty(folder: Folder) -> None:
    with suppress(OSError):  # another process has written to it
        folder.remove_if_empty()


def _here() -> dict[str, Any]:
    """Describe this process; its start time distinguishes it from later ones with the same pid."""
    return {
        "id": uuid4().hex,
        "process": os.getpid(),
        "started": psutil.Process().create_time(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "since": time.time(),
        "beat": 0,
    }


def _machine() -> str:
    """Return an id of this machine's boot, and of the container's pid namespace."""
    names = ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid")
    with suppress(OSError):
        return f"{Path(names[0]).read_text().strip()} {os.readlink(names[1])}"
    return f"{socket.gethostname()} {psutil.boot_time()}"


def _lock(folder: Folder, stack: ExitStack) -> None:
    """Lock a local folder until the stack closes or this process dies. Raises UserError, naming the process that holds it."""
    file = Path(folder.where, LOCK)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(_taken(folder, _owner(folder) or {})) from error
    stack.callback(lock.release)
    # Called before the release: afterwards it could be the file of the next owner.
    stack.callback(file.unlink, missing_ok=True)


def _claim(folder: Folder, me: dict[str, Any]) -> None:
    """Write this process as the folder's owner. Raises UserError while another owner is alive."""
    former = _owner(folder)
    if former is not None and _is_alive(folder, former):
        raise UserError(_taken(folder, former))
    folder.write(OWNER, json.dumps(me))
    if not isinstance(folder.where, Path):  # object stores have no locks: the last writer wins
        time.sleep(RACE_S)
        if (last := _owner(folder) or me)["id"] != me["id"]:
            raise UserError(_taken(folder, last))


def _is_alive(folder: Folder, owner: dict[str, Any]) -> bool:
    if owner.get("machine") == _machine():
        if isinstance(folder.where, Path) or owner["process"] == os.getpid():
            return owner["id"] in _OWN  # for another process, `_lock` would have failed
        try:
            process = psutil.Process(owner["process"])
            # A pid may be another process's by now.
            is_it = abs(process.create_time() - owner["started"]) < SAME_START_S
            # A killed process stays as a zombie until its parent has waited for it.
            return is_it and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
    # Its clock can't be compared with this one's: only a change of its count shows that it is alive.
    with waiting_for(f"a sign of life of {_named(owner)}, which wrote {folder.where} last"):
        until = time.monotonic() + EXPIRY_S
        while time.monotonic() < until:
            time.sleep(BEAT_S / 10)
            now = _owner(folder)
            if now is None or now["id"] != owner["id"]:
                # None: it has ended meanwhile. Another id: a third process has claimed the folder, and is alive.
                return now is not None
            if now["beat"] != owner["beat"]:
                return True
    return False


def _owner(folder: Folder) -> dict[str, Any] | None:
    """Read the owner; None without one, or where the file is truncated."""
    try:
        owner = json.loads(folder.read(OWNER) or "null")
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"id", "process", "beat"} <= owner.keys() else None


def _beat(folder: Folder, me: dict[str, Any], ended: threading.Event, ownership: Ownership) -> None:
    """Write heartbeats until the end; a failed write is made up for by the next one."""
    while not ended.wait(BEAT_S):
        me["beat"] += 1
        with suppress(*STORAGE_ERRORS):
            # For good: the other process may end, and take its record along.
            ownership.is_lost = ownership.is_lost or (_owner(folder) or me)["id"] != me["id"]
            if not ownership.is_lost:
                folder.write(OWNER, json.dumps(me))


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('process', 'unknown')} on {owner.get('host', 'another machine')}"


def _taken(folder: Folder, owner: dict[str, Any]) -> str:
    since = f" since {clock_time(owner['since'])}" if "since" in owner else ""
    return (
        f"output_dir: {str(folder.where)!r} is being written by {_named(owner)}{since}; wait for its end or stop it, or give "
        "another output_dir"
    )
