"""Memory of this process and its descendants, private and shared apart, sampled while something runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

__all__ = ["GROUPS", "Memory", "MemoryWatch"]

SAMPLE_EVERY_S = 0.5
GROUPS = {"ray::RayTrainWorker": "workers", "ray::": "tasks and actors", "raylet": "raylet"}
"""Beginning of a process's title -> its group; the first that fits. `driver` is this process; others aren't counted."""


@dataclass(frozen=True)
class Memory:
    """Of one process, in bytes. Pages that several processes map count in equal parts (PSS)."""

    private: int = 0
    """Its own: what is in no file."""
    shared: int = 0
    """Mapped files (rows, scores, libraries) and Ray's object store."""

    def most(self, other: Memory) -> Memory:
        """Return the larger value of each."""
        return Memory(max(self.private, other.private), max(self.shared, other.shared))


@dataclass
class MemoryWatch:
    """Peaks of the processes of each group, by the group's name."""

    peaks: dict[str, Memory] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample until the context ends."""
        done = threading.Event()
        thread = threading.Thread(target=self._sample_until, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _sample_until(self, done: threading.Event) -> None:
        self._sample()
        while not done.wait(SAMPLE_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            try:
                group = "driver" if process == me else _group(process)
                if group is not None:
                    self.peaks[group] = self.peaks.get(group, Memory()).most(_memory(process.pid))
            # It has ended meanwhile.
            except (psutil.NoSuchProcess, OSError):
                continue


def _group(process: psutil.Process) -> str | None:
    # The whole title: the name is cut to 15 characters.
    title = " ".join(process.cmdline()[:1]).rpartition("/")[2]
    return next((group for start, group in GROUPS.items() if title.startswith(start)), None)


def _memory(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return Memory(sizes["Pss_Anon"], sizes["Pss_File"] + sizes["Pss_Shmem"])
