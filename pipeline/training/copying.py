"""Copies of growing folders in a run's storage."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs

from pipeline.training.checkpoints import copy_file

__all__ = ["FolderCopy"]


class FolderCopy:
    """Keeps folders of this machine the same in a run's folder elsewhere.

    Args:
        local: the folder that they are in.
        names: theirs.
        filesystem, run: where they are to be.
    """

    def __init__(self, local: Path, names: list[str], filesystem: fs.FileSystem, run: str) -> None:
        self._local, self._names = local, names
        self._filesystem, self._run = filesystem, run
        self._copied: dict[Path, tuple[int, int]] = {}

    def bring(self) -> None:
        """Copy files that are new, or have changed."""
        for name in self._names:
            for file in sorted(path for path in (self._local / name).rglob("*") if path.is_file()):
                status = file.stat()
                version = status.st_size, status.st_mtime_ns
                if self._copied.get(file) != version:
                    copy_file(file, self._filesystem, f"{self._run}/{file.relative_to(self._local).as_posix()}")
                    self._copied[file] = version
