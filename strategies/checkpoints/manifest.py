"""Manifests: which files a rank has written, what they must hash to, and whose checkpoint it is."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FORMAT_VERSION", "MANIFEST", "differences", "find_damage", "own_files", "read_manifests", "write_manifest"]

FORMAT_VERSION = 1
MANIFEST = re.compile(r"manifest-(\d{5})-of-(\d{5})\.json")
OF_A_RANK = re.compile(r"(?:state|manifest)-(\d{5})-of-\d{5}\.\w+|rng_state_(\d+)\.pth")
"""Files that name the rank they are of; all others are rank 0's."""


def manifest_name(rank: int, world_size: int) -> str:
    """File name of the manifest of a rank."""
    return f"manifest-{rank:05d}-of-{world_size:05d}.json"


def own_files(folder: Path, rank: int) -> list[Path]:
    """The files of a checkpoint folder, shared by the ranks of a node, that are this rank's to describe and to store.

    Hidden ones are nobody's yet: another rank is about to put them in their place, a manifest or, as safetensors does, weights.
    """
    found = (path for path in folder.rglob("*") if not path.name.startswith("."))
    return sorted(path for path in found if _rank_of(path) == rank and path.is_file())


def _rank_of(path: Path) -> int:
    found = OF_A_RANK.fullmatch(path.name)
    return int(found.group(1) or found.group(2)) if found else 0


def write_manifest(folder: Path, rank: int, world_size: int, content: Mapping[str, Any]) -> None:
    """Describe this rank's files; in one move, so that a manifest is whole or absent."""
    files = {str(path.relative_to(folder)): _described(path) for path in own_files(folder, rank)}
    name = manifest_name(rank, world_size)
    manifest = {"format_version": FORMAT_VERSION, "rank": rank, "world_size": world_size, "files": files, **content}
    partial = folder / f".{name}.partial"
    partial.write_text(json.dumps(manifest))
    os.replace(partial, folder / name)


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of all ranks, in their order.

    Raises:
        ValueError: where one is missing or can't be read: the checkpoint was not written to its end.
    """
    names = sorted(path.name for path in folder.iterdir() if MANIFEST.fullmatch(path.name))
    if missing := missing_manifests(names):
        raise ValueError(f"{folder.name} is incomplete: it lacks {missing[0]}")
    return [_read_manifest(folder / name) for name in names]


def _read_manifest(path: Path) -> dict[str, Any]:
    """What one says, which may be of another version, but has files and pieces."""
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.parent.name} is damaged: {path.name} is no JSON ({error})") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    is_whole = isinstance(files, dict) and all(
        isinstance(file, dict) and isinstance(file.get("bytes"), int) and isinstance(file.get("sha256"), str)
        for file in files.values()
    )
    if not is_whole or not isinstance(manifest.get("pieces"), dict) or {"rank", "world_size"} - manifest.keys():
        raise ValueError(f"{path.parent.name} is damaged: {path.name} doesn't say what a manifest says")
    return manifest


def is_complete(folder: Path) -> bool:
    """Whether a folder has the manifests of all ranks."""
    return folder.is_dir() and not missing_manifests(path.name for path in folder.iterdir())


def missing_manifests(names: Iterable[str]) -> list[str]:
    """Names of the manifests that a complete checkpoint would have beside these files."""
    found = {match.group(0): int(match.group(2)) for match in map(MANIFEST.fullmatch, names) if match}
    world_size = max(found.values(), default=1)
    return [name for rank in range(world_size) if (name := manifest_name(rank, world_size)) not in found]


def find_damage(folder: Path, manifests: Iterable[Mapping[str, Any]] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, in a phrase; None where all are as they were written."""
    try:
        manifests = read_manifests(folder) if manifests is None else manifests
    except ValueError as error:
        return str(error)
    for manifest in manifests:
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{folder.name} is damaged: {name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{folder.name} is damaged: {name} has {path.stat().st_size:,} bytes, not {expected['bytes']:,}"
            if _described(path)["sha256"] != expected["sha256"]:
                return f"{folder.name} is damaged: {name} has another checksum than its manifest says"
    return None


def differences(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """In what a checkpoint is another run's, a line each.

    Args:
        manifest: of rank 0.
        identity: what the run at hand is; only what both know is compared.
    """
    if (version := manifest.get("format_version")) != FORMAT_VERSION:
        return [f"format: was {version}, this version of prefray reads {FORMAT_VERSION}"]
    was = manifest.get("identity", {})
    return [f"{name}: was {was[name]}, is {value}" for name, value in identity.items() if name in was and was[name] != value]
