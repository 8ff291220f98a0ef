"""The files of a working directory that are uploaded with a job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from cluster.ray_compat import walk_package

__all__ = ["NEVER", "Package", "list_package", "literal"]

NEVER = tuple(
    ".git .venv venv __pycache__ *.egg-info .ipynb_checkpoints .mypy_cache .pytest_cache .ruff_cache .DS_Store "
    ".env .env.* .envrc .netrc .pgpass .pypirc .git-credentials *.pem *.key id_rsa* id_ed25519* "
    ".ssh .aws .azure .kube .docker .config .cache .ray".split()
)
"""Patterns of files that no job needs, or that hold secrets."""
MOST = 100 << 20
"""Bytes of the largest upload that a job server accepts (ray._private.ray_constants.DASHBOARD_CLIENT_MAX_SIZE)."""
TOO_MANY = 20_000
"""Files after which listing stops: the folder is no project's."""
SHOWN = 5
"""Files that a message about size names."""


@dataclass(frozen=True)
class Package:
    """The files of a working directory that are packed, with their sizes in bytes."""

    root: Path
    files: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes before compression."""
        return sum(self.files.values())

    def check(self) -> None:
        """Refuse a package larger than a job server accepts.

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
        """Pack the files. With excludes in the runtime environment instead, Ray would apply them to our modules too."""
        # A zip has no dates before 1980, and container images set files to 1970: those are moved, not refused.
        with ZipFile(archive, "w", ZIP_DEFLATED, strict_timestamps=False) as packed:
            for name in sorted(self.files):
                packed.write(self.root / name, name)


def list_package(root: Path, excludes: Iterable[str] = ()) -> Package:
    """List the files that Ray packs: all but those matched by `excludes`, .gitignore and .rayignore (gitignore patterns)."""
    root = root.resolve()
    patterns = (*NEVER, *excludes)
    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path.stat().st_size
            # While it is listed: a home folder by mistake would take minutes to list.
            if len(files) > TOO_MANY:
                raise ValueError(
                    f"--working-dir: {root} has more than {TOO_MANY} files; name the folder that holds recipe and data, and in "
                    ".rayignore what isn't needed of it (.gitignore counts too)"
                )

    walk_package(root, patterns, take)
    return Package(root, files)


def literal(path: str) -> str:
    """Return a gitignore pattern that matches exactly this path, relative to the root."""
    # With the slash in front a pattern holds for the root only, not for folders of that name below it.
    return "/" + "".join(f"\\{letter}" if letter in "*?[]\\!# " else letter for letter in path)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
