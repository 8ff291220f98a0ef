"""Leases of other processes: real ones, and records of ones that aren't there, such as on other machines."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import RunFailed, UserError
from pipeline.io import holder, lease, lease_records
from pipeline.io.holder import Holder, here, parse
from pipeline.io.lease import held
from pipeline.io.lease_records import open_records
from pipeline.io.storage import Folder

__all__ = ["NAME", "HoldingProcess", "another", "give_sign", "holder_of", "leave", "take_over"]

NAME = "it.lease"


class SharedFileSystem(LocalFileSystem):
    """`shared:///folder`, by fsspec: stands for storage that several processes reach and that has no conditional writes."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("shared://"))


fsspec.register_implementation("shared", SharedFileSystem, clobber=True)


def another(**changes: Any) -> Holder:
    """A holder on another machine."""
    return replace(here(), **{"process": 7, "host": "node-7", "machine": "another", **changes})


def leave(folder: Folder, name: str, holder: Holder) -> None:
    """Write a holder's record where there is none."""
    folder.create()
    assert open_records(folder, name).create(holder.record(0)) is not None


def take_over(folder: Folder, name: str, holder: Holder) -> None:
    """Write a holder's record in place of the one that is there."""
    records, version = open_records(folder, name), None
    while version is None:  # the other one renews its record
        found = records.read()
        assert found is not None
        version = records.take_over(found.version, holder.record(0))


def give_sign(folder: Folder, name: str, holder: Holder, beat: int) -> None:
    """Renew a holder's record."""
    records = open_records(folder, name)
    found = records.read()
    assert found is not None and records.renew(found.version, holder.record(beat)) is not None


def holder_of(folder: Folder, name: str) -> Holder | None:
    """Who holds a lease, or held it last."""
    found = open_records(folder, name).read()
    return None if found is None else parse(found.text)


class HoldingProcess:
    """A process that takes leases as it is told, and says what came of it."""

    def __init__(self, beat: float = 10.0, validity: float = 60.0, machine: str | None = None, skew: float = 0.0) -> None:
        """Args: machine: what it thinks where it is; skew: seconds by which its clock is wrong."""
        settings = json.dumps({"beat": beat, "validity": validity, "machine": machine, "skew": skew})
        words = [sys.executable, "-m", "tests.leases", settings]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(words, cwd=Path(__file__).parents[1], **pipes)

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, line: str) -> None:
        """Say which folder to take the lease of, or "end" to give it back."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Read "holds", the reason why not, or at the end "ended" or the message for a lost lease."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.tell(line)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def _answer(line: str) -> None:
    location = line.strip()
    try:
        with held(Folder(location if "://" in location else Path(location)), NAME) as mine:
            print("holds", flush=True)
            sys.stdin.readline()
            mine.check()
    except (UserError, RunFailed) as error:
        print(error, flush=True)
    else:
        print("ended", flush=True)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    lease.BEAT_S, holder.VALIDITY_S = given["beat"], given["validity"]
    lease.POLL_S, lease_records.RACE_S = 0.1, 0.3
    clock, place = time.time, holder.machine()
    time.time = lambda: clock() + given["skew"]
    holder.machine = lambda: given["machine"] or place
    for request in iter(sys.stdin.readline, ""):
        _answer(request)
