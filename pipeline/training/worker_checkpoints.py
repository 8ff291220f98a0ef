"""A worker's part of the run's checkpoints: stored beside the training, and fetched.

Checkpoints aren't reported to Ray: it would keep a record of them in the run's folder, restore a later run from it, and not
start where the record and the folder differ.
"""

from __future__ import annotations

import shutil
from concurrent import futures
from functools import partial
from pathlib import Path

import ray.train
from pyarrow import fs
from ray.train.collective import barrier, broadcast_from_rank_zero

from pipeline.io.retry import with_retries
from pipeline.runs.checkpoints import fetch, free_name, name_of, rotate, stage, step_of, store
from pipeline.training.heartbeat import beat

__all__ = ["WorkerCheckpoints"]


class WorkerCheckpoints:
    """Stores this rank's parts of checkpoints in the run's folder, and deletes old checkpoints, in a thread.

    Args:
        location: filesystem and path of the run's folder.
    """

    def __init__(self, location: tuple[fs.FileSystem, str]) -> None:
        self._location = location
        # One thread: what is submitted runs in order, a rotation before the upload of the next checkpoint.
        self._thread = futures.ThreadPoolExecutor(max_workers=1)
        self._storing: futures.Future[None] | None = None
        """What the thread does last; None once it has ended."""

    def put(self, written: Path, step: int) -> str:
        """Begin to store this rank's part of a checkpoint; return the checkpoint's name. Every rank must call it.

        Args:
            written: the folder that the trainer has written, in its output folder.
            step: its optimizer step.
        """
        context = ray.train.get_context()
        name, rank, location = None, context.get_world_rank(), self._location
        if rank == 0:
            # Rank 0 alone: the others, a moment later, would find the name taken.
            name = with_retries(partial(free_name, *location, step), "looking for checkpoints", beat)
        name = broadcast_from_rank_zero(name)  # also a barrier: all ranks have written their parts
        # Moved within this disk: the trainer deletes its own old checkpoints, maybe before they are uploaded.
        staged = stage(written, rank, written.parent / f"storing-{rank}" / name)
        self._storing = self._thread.submit(_store, staged, *location, name)
        return str(name)

    def rotate(self, newest: str, limit: int, best: int | None) -> None:
        """Begin to delete old checkpoints; for one rank alone.

        Args:
            newest: name of the newest checkpoint that all ranks have stored.
            limit: how many to keep.
            best: step of the best checkpoint, which stays.
        """
        self._storing = self._thread.submit(rotate, *self._location, newest, limit, best)

    def wait(self) -> None:
        """Wait until this rank's part of the last checkpoint is stored and deleted here, and old checkpoints are deleted.

        The next checkpoint is written only then: storage that is slower than training would fill this node's disk.

        Raises:
            OSError: as `store`.
        """
        self.finish()
        self.is_idle()

    def finish(self) -> None:
        """Wait as `wait` does, whatever storage raises: for a trainer that has failed, before another one begins."""
        while self._storing is not None and not self._storing.done():
            futures.wait([self._storing], timeout=5)
            # An upload of minutes is no hang.
            beat()

    def fetch(self, folder: Path) -> Path:
        """Return the path of a checkpoint on this node: in storage where that is local, else downloaded to `folder`."""
        self.wait()
        barrier()
        # All parts are stored now, and rank 0's rotation is over, which must delete nothing of what is read here.
        step = step_of(folder.name)
        filesystem, run = self._location
        if isinstance(filesystem, fs.LocalFileSystem):
            return Path(run, name_of(filesystem, run, step))
        if ray.train.get_context().get_local_rank() == 0:
            fetch(filesystem, run, step, folder)
        barrier()
        return folder

    def is_idle(self) -> bool:
        """Return whether the thread has nothing to do; raise the error with which it ended."""
        if self._storing is not None and self._storing.done():
            # Raises here, in the trainer's thread, what storage raised in the other one.
            self._storing.result()
            self._storing = None
        return self._storing is None


def _store(staged: Path, filesystem: fs.FileSystem, run: str, name: str) -> None:
    """Store a staged part of a checkpoint, and delete it here."""
    store(staged, filesystem, f"{run}/{name}")
    shutil.rmtree(staged)
