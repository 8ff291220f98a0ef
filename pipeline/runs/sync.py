"""One-way sync of growing folders to a run's storage."""

from __future__ import annotations

from pathlib import Path

from pyarrow import fs

from pipeline.runs.checkpoints import copy_file

__all__ = ["FolderSync"]


class FolderSync:
    """Uploads local folders to a run's folder in storage.

    Args:
        local: parent of the local folders.
        names: of the folders.
        filesystem, run: the run's folder.
    """

    def __init__(self, local: Path, names: list[str], filesystem: fs.FileSystem, run: str) -> None:
        self._local, self._names = local, names
        self._filesystem, self._run = filesystem, run
        self._copied: dict[Path, tuple[int, int]] = {}

    def sync(self) -> None:
        """Upload files that are new or have changed."""
        for name in self._names:
            for file in sorted(path for path in (self._local / name).rglob("*") if path.is_file()):
                # Before the copy: a file that grows while it is copied is copied again the next time.
                status = file.stat()
                version = status.st_size, status.st_mtime_ns
                if self._copied.get(file) != version:
                    copy_file(file, self._filesystem, f"{self._run}/{file.relative_to(self._local).as_posix()}")
                    self._copied[file] = version
