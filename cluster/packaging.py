"""What of a working directory goes to the cluster with a job."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

__all__ = ["NEVER", "Package", "list_package", "literal"]

NEVER = (
    *(".git", ".venv", "venv", "__pycache__", "*.egg-info", ".ipynb_checkpoints"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".DS_Store"),
    *(
        ".env",
        ".env.*",
        ".envrc",
        ".netrc",
        ".pgpass",
        ".pypirc",
        ".git-credentials",
        "*.pem",
        "*.key",
        "id_rsa*",
        "id_ed25519*",
    ),
    *(".ssh", ".aws", ".azure", ".kube", ".docker", ".config", ".cache", ".ray"),
)
"""Patterns of what no job needs, and of files that hold secrets."""
MOST = 100 << 20
"""Bytes that a job server takes at once (ray._private.ray_constants.DASHBOARD_CLIENT_MAX_SIZE)."""
TOO_MANY = 20_000
"""Files after which nobody looks further: it is no project's folder."""
SILENT = logging.Logger(__name__, logging.CRITICAL + 1)
"""For Ray's traveller, which tells of the ignore files that it finds, and of a traveller that has seen enough."""
SHOWN = 5
"""Files that a message about size names."""


@dataclass(frozen=True)
class Package:
    """The files of a working directory that Ray will pack, with their bytes."""

    root: Path
    files: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes before they are compressed."""
        return sum(self.files.values())

    def check(self) -> None:
        """Refuse more than a job server takes.

        Raises:
            ValueError: naming the biggest files.
        """
        if self.size <= MOST:
            return
        biggest = sorted(self.files, key=lambda name: -self.files[name])[:SHOWN]
        files = ", ".join(f"{name} ({_mib(self.files[name])})" for name in biggest)
        raise ValueError(
            f"--working-dir: {self.root} has {_mib(self.size)} in {len(self.files)} files, and a job brings at most "
            f"{_mib(MOST)}; the biggest: {files}; put data and models on storage that the cluster reaches, and "
            "name what isn't needed in .rayignore (.gitignore counts too)"
        )

    def write(self, archive: Path) -> None:
        """Pack the files, so that Ray needn't be told what to leave out: it would leave that out of our modules too."""
        with ZipFile(archive, "w", ZIP_DEFLATED, strict_timestamps=False) as packed:
            for name in sorted(self.files):
                packed.write(self.root / name, name)


def list_package(root: Path, excludes: Iterable[str] = ()) -> Package:
    """The files that Ray packs: all but those that `excludes`, .gitignore and .rayignore name, by gitignore's patterns."""
    # What Ray itself packs by; there is no public way to ask.
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    root = root.resolve()
    patterns = (*NEVER, *excludes)
    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.stat().st_size
            if len(files) > TOO_MANY:
                raise ValueError(
                    f"--working-dir: {root} has more than {TOO_MANY} files; name the folder that holds recipe and data, and in "
                    ".rayignore what isn't needed of it (.gitignore counts too)"
                )

    with_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(root, [_get_excludes(root, list(patterns))], take, with_gitignore, SILENT)
    return Package(root, files)


def literal(path: str) -> str:
    """A pattern that means just this path, relative to the root."""
    return "/" + "".join(f"\\{letter}" if letter in "*?[]\\!# " else letter for letter in path)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
